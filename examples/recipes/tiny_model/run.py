"""Make the tiny model that ships with midilite, stage by stage.

    python tiny_model/run.py pack --meshes .../meshes/kenney        # triangles and solids of the 3D models
    python examples/recipes/tiny_model/run.py draw                                   # decide the scenes (all CPU cores)
    torchrun --nproc_per_node 2 tiny_model/run.py vae --minutes 6   # the shape VAE, on one GPU or several
    python examples/recipes/tiny_model/run.py decoder --minutes 10                 # deeper, on the same latents
    torchrun --nproc_per_node 2 examples/recipes/tiny_model/run.py flow --minutes 8 --total_minutes 12
    torchrun --nproc_per_node 2 examples/recipes/tiny_model/run.py flow --minutes 4 --total_minutes 12   # goes on
    python examples/recipes/tiny_model/run.py tuning --share 0/8                   # the study of adapters on vehicles
    python examples/recipes/tiny_model/run.py gallery --device cpu                 # the README's picture, the worst
    python examples/recipes/tiny_model/run.py finish --meshes .../meshes/kenney     # assets, card, tables, pictures

`--toy` runs every stage at a size that a laptop does in a minute, which tests the path and learns nothing.
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from tiny_model.command import main  # noqa: E402

if __name__ == "__main__":
    main()

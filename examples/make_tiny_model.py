"""Make the tiny model that ships with midilite, stage by stage.

    python examples/make_tiny_model.py pack --meshes .../meshes/kenney        # triangles and solids of the 3D models
    python examples/make_tiny_model.py draw                                   # decide the scenes (all CPU cores)
    torchrun --nproc_per_node 2 examples/make_tiny_model.py vae --minutes 6   # the shape VAE, on one GPU or several
    torchrun --nproc_per_node 2 examples/make_tiny_model.py flow --minutes 8 --total_minutes 12
    torchrun --nproc_per_node 2 examples/make_tiny_model.py flow --minutes 4 --total_minutes 12   # goes on
    torchrun --nproc_per_node 2 examples/make_tiny_model.py lora              # the study of adapters on vehicles
    python examples/make_tiny_model.py finish --meshes .../meshes/kenney     # assets, card, tables, pictures

`--toy` runs every stage at a size that a laptop does in a minute, which tests the path and learns nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tiny_model.command import main  # noqa: E402

if __name__ == "__main__":
    main()

"""Make the tiny model that ships with midilite, stage by stage.

    RUN=examples/recipes/tiny_model/run.py
    python $RUN pack --meshes .../meshes/kenney                           # triangles and solids of the 3D models
    python $RUN draw                                                      # decide the scenes (all CPU cores)
    torchrun --nproc_per_node 2 $RUN vae --minutes 6                      # the shape VAE, on one GPU or several
    python $RUN decoder --minutes 10                                      # deeper, on the same latents
    python $RUN surfaces                                                  # how good its surfaces are
    torchrun --nproc_per_node 2 $RUN flow --minutes 8 --total_minutes 12  # transformer and image encoders
    torchrun --nproc_per_node 2 $RUN flow --minutes 4 --total_minutes 12  # goes on
    torchrun --nproc_per_node 2 $RUN flow --start FOLDER --minutes 13.5   # from a model, deepened if it is smaller
    python $RUN tries --share 0/4 --minutes 3                             # other ways to train them, each alone
    python $RUN tries_page                                                # their table in this folder's README
    python $RUN measure                                                   # its scenes, for each seed of the noise
    python $RUN sampling                                                  # solvers and numbers of steps
    python $RUN speed --meshes .../meshes/kenney --runs fast              # speed adapters
    python $RUN tuning --share 0/8                                        # the study of adapters on vehicles
    python $RUN tuning_page                                               # its tables in How to fine-tune
    python $RUN gallery --device cpu                                      # the README's picture, the worst
    python $RUN thin --device cpu                                         # the scenes with the thinnest parts
    python $RUN finish --meshes .../meshes/kenney                         # assets, card, pictures

`--toy` runs every stage at a size that a laptop does in a minute, which tests the path and learns nothing.
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from tiny_model.command import main  # noqa: E402

if __name__ == "__main__":
    main()

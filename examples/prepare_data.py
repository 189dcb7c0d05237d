"""Turn a folder of meshes into training data: pictures, instance masks and surface points.

    python examples/prepare_data.py --input_dir data/raw_meshes --output_dir data/training_data --num_samples 20480

The input folder holds loose mesh files (each is one object) and/or one subfolder per scene, whose meshes (or the nodes
of whose only file) are the scene's instances; see `midilite/data_prep/finding.py`. Without pictures, scenes are
rendered. What is written is described in `midilite/data_prep/prepare.py`. Running the command again continues where it
stopped. With --recursive, folders at any depth are scenes, named by their path: `a/models/x.glb` is scene `a_models`.

    python examples/prepare_data.py --check data/training_data

prepares nothing: it reads every sample of a folder of training data (also of the other layouts that train.py takes, see
`midilite/data/scenes.py`) and prints what is in it and what is wrong with it. It also draws outputs/contact_sheet.png
(`--contact_sheet`): pictures with the outlines of their masks, and the surface points beside them. Masks themselves
look black, because they hold 1, 2, 3 as grey values, which every reader of the documented layout understands.

The exit code is 1 as well when something was skipped, or is no mesh format read here but may be an object (each file is
named with its reason in the log and in dataset_info.json), or when the check found errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("prepare_data")

if __name__ == "__main__":
    run_command(main)

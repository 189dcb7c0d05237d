"""A local page: mark the objects of a photograph, make the scene, walk around it, and watch trainings.

python examples/studio.py                       # http://127.0.0.1:8765 shows what lies below this folder
python examples/studio.py --folder ~/scenes --port 0
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("studio")

if __name__ == "__main__":
    run_command(main)

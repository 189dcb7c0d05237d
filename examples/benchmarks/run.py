"""Time, operations per second and memory of everything that midilite does, beside the reference's and the goals.

    python examples/benchmarks/run.py --page --output rows.jsonl           # all of the performance page, one GPU
    python examples/benchmarks/run.py --write_page rows.jsonl              # and into the page with it
    python examples/benchmarks/run.py --output rows.jsonl                  # all usual rows
    python examples/benchmarks/run.py --rows "step 4" "train 4" mesh       # some rows, by the beginnings of their names
    python examples/benchmarks/run.py --profile --rows "step 4 compiled"   # and what its time goes into
    python examples/benchmarks/run.py --list                               # which rows there are
    python examples/benchmarks/run.py --device cpu --quick                 # everything small, in seconds
    python examples/benchmarks/run.py --rows cpu --against ../before       # two checkouts by turns
    python examples/benchmarks/run.py --markdown rows.jsonl                # measured rows as the page's table

Each row is one JSON line on standard output (and in `--output`, as soon as it is measured); the table goes to standard
error, and the last line is JSON with the machine, all medians, and what failed. A row that fails says why, and the
next one is measured. Nothing is downloaded: weights and inputs are random. What was tried and did not help is in
`benchmarks/tried.md`.
"""

import sys
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # run from a checkout without installing

from midilite.commands.launch import run_command, set_up_torch  # noqa: E402

set_up_torch()  # as train.py and infer.py do

from benchmarks.command import main  # noqa: E402

if __name__ == "__main__":
    run_command(main)

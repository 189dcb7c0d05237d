"""Numbers in the pages of the benchmark, and the row in README.md, are those that it wrote; so is what is said.

Past bug of many a README: a table from one state of the code, a text from another, and no file that either came from.
"""

import json
import shutil
from pathlib import Path

from benchmarks import page
from benchmarks.parallel_report import compare
from benchmarks.parallel_report import markdown as parallel_markdown
from benchmarks.report import markdown, read_rows

from midilite.training.options import PRESETS

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
README, PAGE, TRIED, RESULTS = (
    ROOT / "README.md",
    BENCHMARKS / "README.md",
    BENCHMARKS / "tried.md",
    BENCHMARKS / "results",
)
ROWS = read_rows([RESULTS / "page.jsonl"])
BY_NAME = {row["row"]: row for row in ROWS}


def test_the_page_and_the_readme_are_written_from_the_rows(tmp_path):
    """As `run.py --write_page` writes them: writing again changes nothing."""
    copies = [Path(shutil.copy(path, tmp_path / f"{number}.md")) for number, path in enumerate((PAGE, README))]
    page.write_page(*copies, ROWS)
    assert [copy.read_text(encoding="utf-8") for copy in copies] == [
        p.read_text(encoding="utf-8") for p in (PAGE, README)
    ]


def test_memory_that_the_readme_tells_is_of_the_rows():
    """What inference of four objects takes, beside the command that does it."""
    memory = [BY_NAME[f"memory {name} infer"]["peak_reserved_gib"] for name in ("12gb", "6gb")]
    told = "Four objects take {:.1f} GiB of a GPU, and {:.1f} GiB with".format(*memory)
    assert told in README.read_text(encoding="utf-8")


def test_rows_of_presets_are_of_the_presets():
    """The options may not change without new measurements."""
    for name, preset in PRESETS.items():
        notes = BY_NAME[f"memory {name} train"]["notes"]
        instances = "+".join([str(preset["max_num_instances"])] * preset["batch_size"])
        assert (notes["instances"], notes["rank"]) == (instances, preset["lora_rank"])
        assert notes["base"] == preset.get("quantize_base", "none")


def test_the_log_holds_the_tables_of_its_rows():
    """As `benchmarks/run.py --markdown` prints them."""
    text = TRIED.read_text(encoding="utf-8")
    for name in ("H100", "H200"):
        _, _, after = text.partition(f"<!-- {name}: begin -->\n")
        rows = read_rows([RESULTS / f"benchmark_{name.lower()}.jsonl"])
        assert after.partition(f"\n<!-- {name}: end -->")[0] == markdown(rows)


def test_the_page_holds_what_two_gpus_did():
    """The tables as `benchmarks/distributed.py --markdown` prints them, and what the text says of them."""
    lines = [json.loads(line) for line in (RESULTS / "benchmark_h200x2.jsonl").read_text().splitlines()]
    cases = [line for line in lines if "case" in line]
    text = PAGE.read_text(encoding="utf-8")
    for part in parallel_markdown(cases).split("\n\n"):
        assert part in text
    found, text = compare(cases), " ".join(text.split())
    gains = [round(100 * (found[f"gain_of_balancing_{kind}"] - 1)) for kind in ("per_process", "total")]
    assert "Balancing gains {}% with 8 scenes per process and {}% with 4".format(*gains) in text
    assert found["largest_difference_of_losses"] == found["largest_difference_of_losses_fp32"] == 0
    assert f"and {found['sharded_step_time']:.1f} times the time" in text and found["sharded_base_memory"] == 0.5
    restart = json.loads((RESULTS / "restart_h200x2.json").read_text())
    assert restart["killed_same_bytes"] and restart["again_same_bytes"] and not restart["problems"]
    assert round(restart["runs"]["killed"]["seconds_until_all_ended"]) == 30


def test_estimates_of_the_presets_are_not_below_what_they_took():
    """An estimate that is too low promises what does not fit."""
    margins = page.preset_margins(BY_NAME)
    assert set(margins) == set(PRESETS) and min(margins.values()) > -0.005, margins

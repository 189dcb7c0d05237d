"""Numbers in README.md and examples/benchmark.md are those that the benchmark wrote, and so is what is said of them.

Past bug of many a README: a table from one state of the code, a text from another, and no file that either came from.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from midilite import lora
from midilite.dit import DiT
from midilite.memory import estimate_presets
from midilite.train_options import PRESETS, TrainOptions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from benchmarks.models import SIZES  # noqa: E402
from benchmarks.report import markdown, read_rows  # noqa: E402

README, LOG = ROOT / "README.md", ROOT / "examples" / "benchmark.md"
ROWS = {gpu: read_rows([ROOT / "examples" / "results" / f"benchmark_{gpu.lower()}.jsonl"]) for gpu in ("H100", "H200")}
BY_NAME = {gpu: {row["row"]: row for row in rows} for gpu, rows in ROWS.items()}
MILLISECONDS = {"ms": 1, "s": 1000}


def table_rows(text: str) -> list[dict[str, str]]:
    """The lines of all tables whose last two columns are the GPU and the row, as {column: cell}."""
    found, columns = [], []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or cells[-2:] == ["GPU", "row"]:
            columns = cells
        elif len(cells) == len(columns) and not set(cells[0]) <= set("-: "):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def said(cell: str) -> tuple[float, int, str]:
    """A cell such as '96.3 ms' as (number, digits after the point, unit)."""
    number, unit = re.fullmatch(r"([\d.]+) (ms|s|GiB)", cell).groups()
    return float(number), len(number.partition(".")[2]), unit


def test_tables_of_the_readme_are_the_measured_rows():
    rows = table_rows(README.read_text(encoding="utf-8"))
    assert len(rows) >= 20
    for cells in rows:
        measured = BY_NAME[cells["GPU"]][cells["row"].strip("`")]
        assert cells["GPU"] in measured["machine"]["device"] and "error" not in measured
        time, digits, unit = said(cells["time"])
        assert round(measured["median_ms"] / MILLISECONDS[unit], digits) == time, cells
        memory, digits, unit = said(cells["reserved"])
        assert round(measured["peak_reserved_gib"], digits) == memory and unit == "GiB", cells
        for name in ("reference", "goal"):
            assert cells.get(name, "") == measured.get(name, ""), cells


def test_rows_of_presets_are_of_the_presets():
    """The options may not change without new measurements."""
    for name, preset in PRESETS.items():
        notes = BY_NAME["H100"][f"memory {name} train"]["notes"]
        instances = "+".join([str(preset["max_num_instances"])] * preset["batch_size"])
        assert (notes["instances"], notes["rank"]) == (instances, preset["lora_rank"])
        assert notes["base"] == preset.get("quantize_base", "none")


@pytest.mark.parametrize("gpu", ROWS)
def test_the_log_holds_the_tables_of_the_rows(gpu):
    """As `benchmark.py --markdown` prints them."""
    _, _, after = LOG.read_text(encoding="utf-8").partition(f"<!-- {gpu}: begin -->\n")
    assert after.partition(f"\n<!-- {gpu}: end -->")[0] == markdown(ROWS[gpu])


def test_the_text_says_what_the_rows_say():
    """Shares by which goals are missed, the error of fp8, what the presets take beside the estimate."""
    h100, h200 = BY_NAME.values()
    text = " ".join(README.read_text(encoding="utf-8").split())

    def missed(*rows: dict) -> list[int]:
        return [round(100 * (row["median_ms"] / float(row["goal"].split(" ms")[0]) - 1)) for row in rows]

    assert "by {} and {}%".format(*missed(h100["step 4 compiled"], h100["step 7 compiled"])) in text
    assert f"fp8 base (by {missed(h100['step 4 fp8'])[0]}%)" in text
    kept = sorted(missed(*(row for name, row in h100.items() if re.fullmatch(r"train .* graph", name))))
    assert f"by {kept[0]} to {kept[-1]}%" in text
    free = {name: missed(row)[0] for name, row in h200.items() if name.endswith("free")}
    assert {name for name, share in free.items() if share > 0} == {"train 1 checkpointed free"}
    assert f"one instance checkpointed (by {free['train 1 checkpointed free']}%)" in text
    reserved = (h100["train 4 checkpointed graph"], h200["train 4 checkpointed free"])
    shares = [round(100 * (row["peak_reserved_gib"] / 5.5 - 1)) for row in reserved]
    assert "the memory of four checkpointed (by {}%, in any order by {}%)".format(*shares) in text
    fp8, plain = (h100["step 4 fp8"]["notes"][f"error_{kind}"] for kind in ("fp8", "plain"))
    errors = (100 * fp8["velocity"], 100 * fp8["guided"], 100 * plain["velocity"], 100 * plain["guided"])
    found = "velocity by {:.0f}% and what guidance makes of it by {:.0f}% (bf16 alone: {:.1f} and {:.1f}%)"
    assert found.format(*errors) in text
    rates = h200["load"]["notes"]["gib_per_second"]
    assert f"{h200['load']['notes']['cold_ms'] / 1000:.2f} s, at {rates['load cold']:.2f} GiB/s" in text
    assert f"at {rates['disk cold']:.2f} GiB/s" in text


def test_estimates_of_the_presets_are_just_above_what_they_took():
    """As far as the README says; an estimate that is too low promises what does not fit."""
    size = SIZES["published"]()
    with torch.device("meta"):
        transformer = DiT(size.dit)
        base = sum(p.numel() for p in transformer.parameters())
        lora.inject(transformer, TrainOptions().adapter_config())
    trained = sum(p.numel() for p in lora.adapter_parameters(transformer).values())
    found = estimate_presets(TrainOptions(), size.dit, base, trained, size.tokens, size.condition_tokens)
    rows = {name: BY_NAME["H100"][f"memory {name} train"] for name in PRESETS}
    less = sorted(round(100 * (1 - row["peak_reserved_gib"] / found[name])) for name, row in rows.items())
    assert less[0] >= 0
    assert f"took {less[0]} to {less[-1]}% less" in " ".join(README.read_text(encoding="utf-8").split())

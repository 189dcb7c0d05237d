"""Numbers in benchmarks/README.md, and the row in README.md, are those that the benchmark wrote; so is what is said.

Past bug of many a README: a table from one state of the code, a text from another, and no file that either came from.
"""

import json
import re
from pathlib import Path

import torch
from benchmarks.models import SIZES
from benchmarks.parallel_report import compare
from benchmarks.parallel_report import markdown as parallel_markdown
from benchmarks.report import markdown, read_rows

from midilite import lora
from midilite.model.dit import DiT
from midilite.training.memory import estimate_presets
from midilite.training.options import PRESETS, TrainOptions

ROOT = Path(__file__).parents[2]
README, LOG = ROOT / "README.md", ROOT / "examples" / "benchmarks" / "README.md"
RESULTS = ROOT / "examples" / "benchmarks" / "results"
ROWS = read_rows([RESULTS / "benchmark_h100.jsonl"])
BY_NAME = {"H100": {row["row"]: row for row in ROWS}}
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


def test_tables_are_the_measured_rows():
    rows = table_rows(LOG.read_text(encoding="utf-8"))
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


def test_the_row_of_the_readme_is_of_the_measured_rows():
    """Four times, one memory, and the reference's in brackets; and what inference of four objects takes."""
    h100, text = BY_NAME["H100"], README.read_text(encoding="utf-8")
    step, train, mesh, scene = (
        h100[name] for name in ("step 4 compiled", "train 4 plain graph", "mesh chair", "scene")
    )
    cells = [
        f"{step['median_ms']:.1f} ms ({step['reference'].split(',')[0]})",
        f"{train['median_ms']:.0f} ms, {train['peak_reserved_gib']:.1f} GiB ({train['reference']})",
        f"{mesh['median_ms']:.1f} ms ({mesh['reference']})",
        f"{scene['median_ms'] / 1000:.2f} s ({scene['reference']})",
    ]
    assert f"| {' | '.join(cells)} |" in text
    memory = [h100[f"memory {name} infer"]["peak_reserved_gib"] for name in ("12gb", "6gb")]
    assert "Four objects take {:.1f} GiB of a GPU, and {:.1f} GiB with".format(*memory) in text


def test_rows_of_presets_are_of_the_presets():
    """The options may not change without new measurements."""
    for name, preset in PRESETS.items():
        notes = BY_NAME["H100"][f"memory {name} train"]["notes"]
        instances = "+".join([str(preset["max_num_instances"])] * preset["batch_size"])
        assert (notes["instances"], notes["rank"]) == (instances, preset["lora_rank"])
        assert notes["base"] == preset.get("quantize_base", "none")


def test_the_log_holds_the_table_of_the_rows():
    """As `benchmarks/run.py --markdown` prints it."""
    for name, rows in {"H100": ROWS, "H200": read_rows([RESULTS / "benchmark_h200.jsonl"])}.items():
        _, _, after = LOG.read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->\n")
        assert after.partition(f"\n<!-- {name}: end -->")[0] == markdown(rows)


def test_the_page_holds_what_two_gpus_did():
    """The tables as `benchmarks/distributed.py --markdown` prints them, and what the text says of them."""
    lines = [json.loads(line) for line in (RESULTS / "benchmark_h200x2.jsonl").read_text().splitlines()]
    cases = [line for line in lines if "case" in line]
    text = LOG.read_text(encoding="utf-8")
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


def test_the_text_says_what_the_rows_say():
    """Shares by which goals are missed, the error of fp8, what the presets take beside the estimate."""
    h100 = BY_NAME["H100"]
    text = " ".join(LOG.read_text(encoding="utf-8").split())

    def missed(*rows: dict) -> list[int]:
        return [round(100 * (row["median_ms"] / float(row["goal"].split(" ms")[0]) - 1)) for row in rows]

    assert "by {} and {}%".format(*missed(h100["step 4 compiled"], h100["step 7 compiled"])) in text
    assert f"fp8 base (by {missed(h100['step 4 fp8'])[0]}%)" in text
    training = {name: missed(row)[0] for name, row in h100.items() if name.startswith("train") and "goal" in row}
    over = {name: share for name, share in training.items() if share > 0}
    assert set(over) == {"train 5+3 plain graph", "train 1 checkpointed free"}
    assert (
        "5 + 3 instances bit for bit (by {}%), and one instance in any order of sums (by {}%)".format(*over.values())
        in text
    )
    limits = {"train 4 plain": 20.0, "train 4 checkpointed": 5.5}
    assert all(
        h100[f"{name} {kind}"]["peak_reserved_gib"] < most
        for name, most in limits.items()
        for kind in ("graph", "free")
    )
    assert missed(h100["mesh chair"])[0] < 0 and h100["scene"]["median_ms"] < 5500
    fp8, plain = (h100["step 4 fp8"]["notes"][f"error_{kind}"] for kind in ("fp8", "plain"))
    errors = (100 * fp8["velocity"], 100 * fp8["guided"], 100 * plain["velocity"], 100 * plain["guided"])
    found = "velocity by {:.0f}% and what guidance makes of it by {:.0f}% (bf16 alone: {:.1f} and {:.1f}%)"
    assert found.format(*errors) in text
    rates = h100["load"]["notes"]["gib_per_second"]
    assert f"{h100['load']['notes']['cold_ms'] / 1000:.2f} s, at {rates['load cold']:.2f} GiB/s" in text
    assert f"at {rates['disk cold']:.2f} GiB/s" in text


def test_estimates_of_the_presets_are_just_above_what_they_took():
    """As far as the page says; an estimate that is too low promises what does not fit."""
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
    assert f"took {less[0]} to {less[-1]}% less" in " ".join(LOG.read_text(encoding="utf-8").split())

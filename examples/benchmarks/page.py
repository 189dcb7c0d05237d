"""The performance page from one run: which rows it shows, and the parts of it that are written from them.

`run.py --page` measures the rows, `run.py --write_page` writes what is between the page's markers (and the row of
figures in README.md). All rows have to be of one machine and one version of the code, or nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recipes.pages import fill, table

from midilite import lora
from midilite.model.dit import DiT
from midilite.training.memory import estimate_presets
from midilite.training.options import PRESETS, TrainOptions

from .models import SIZES

Rows = Mapping[str, Mapping[str, Any]]

SPEED = {
    "step 1 graph": "denoising step with guidance, 1 instance, `--compile`",
    "step 4 compiled": "4 instances, `--compile`",
    "step 7 compiled": "7 instances, `--compile`",
    "step 4 fp8": "4 instances, `--compile --quantize_base fp8`",
    "train 4 plain graph": "LoRA step, 4 instances, `--compile`",
    "train 4 plain dropout": "the same with `--lora_dropout 0.1`",
    "train 4 plain free": "the same, `--no-deterministic`, without dropout",
    "train 4 checkpointed graph": "with `--gradient_checkpointing`",
    "train 1 checkpointed graph": "1 instance, checkpointed",
    "train 5+3 plain graph": "scenes of 5 + 3 instances",
    "mesh chair": "latents to the mesh of a chair, grid of 257^3",
    "scene": "picture of 4 objects to GLB, 50 steps, `--compile`",
    "scene fast 4 steps 4 objects": "the same with a speed adapter, 4 steps without guidance",
    "scene fast 4 steps 1 object": "one object, the same",
    "load": "checkpoint of 4.72 GiB, in the page cache, to the GPU",
}
TRAINING = {
    "memory 6gb train": ("6gb", "3 instances, rank 8, int8 base"),
    "memory 8gb train": ("8gb", "4 instances, rank 8"),
    "memory 12gb train": ("12gb", "7 instances, rank 16"),
    "memory 16gb train": ("16gb", "scenes of 5 + 5, rank 32"),
    "memory 24gb train": ("24gb", "scenes of 7 + 7, rank 64"),
    "memory 16gb distill": ("16gb", "`--task distill`, scenes of 5 + 5, rank 32"),
}
INFERENCE = {
    "memory 6gb infer": ("6 GB", "`--offload_parts --quantize_base int8`"),
    "memory 8gb infer": ("8 GB", "`--offload_parts`"),
    "memory 12gb infer": ("12 GB and more", "nothing"),
}
ROWS = (  # in the order of measuring: what needs the same compiled programs together, what may be left out last
    "step 4 compiled", "step 7 compiled", "step 1 graph", "step 4 fp8", "mesh chair", "scene",
    "train 4 plain graph", "train 4 checkpointed graph", "train 5+3 plain graph", "train 1 checkpointed graph",
    "load", *(name for name in TRAINING if name.endswith("train")), *INFERENCE,
    "scene fast 4 steps 4 objects", "train 4 plain dropout", "train 4 plain free", "scene fast 4 steps 1 object",
    "memory 16gb distill",
)  # fmt: skip


def write_page(page: Path, readme: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the parts of both pages that are made from rows.

    Raises:
        ValueError: rows of several machines or versions, or a page without one of the markers.
    """
    made = parts(rows)
    fill(page, {name: part for name, part in made.items() if name != "figures"})
    fill(readme, {"figures": made["figures"]})


def parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What stands between the markers, by their names. Raises ValueError when rows are not of one run."""
    where = run_facts(rows)
    found = {row["row"]: row for row in rows if "error" not in row}
    failed = {row["row"]: row["error"] for row in rows if "error" in row}
    return {
        "run": wrapped([run_sentence(where)]),
        "speed": speed_table(found),
        "speed text": wrapped([*speed_sentences(found), *left_out(found, failed)]),
        "presets": memory_table(("preset", "what a step trains"), TRAINING, found),
        "inference": memory_table(("card", "inference of 4 instances, all parts, with"), INFERENCE, found),
        "presets text": wrapped(estimate_sentences(found)),
        "figures": figures(found, where),
    }


# -------------------------------------------------------------------------------------------------------- the run


def run_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Machine, versions and code of all rows. Raises ValueError when they have not all the same."""
    names = ("device", "torch", "cuda", "dtype", "size", "code")
    kinds = {tuple(str(row.get("machine", {}).get(name, "unknown")) for name in names) for row in rows}
    if len(kinds) != 1:
        told = "; ".join(sorted(", ".join(kind) for kind in kinds))
        raise ValueError(f"a page has rows of one run, these are of {len(kinds)} ({told}): measure anew with --page")
    return dict(zip(names, kinds.pop(), strict=True))


def run_sentence(where: Mapping[str, str]) -> str:
    """On what and with which code."""
    cuda = "" if where["cuda"] in ("unknown", "None") else f", CUDA {where['cuda']}"
    measured, code = "Measured", "versions that were not noted"
    if where["code"] != "unknown":
        measured, code = "Measured in one run", f"`midilite/` at git tree `{where['code']}`"
    return (
        f"{measured} on one {where['device']}, torch {where['torch']}{cuda}, {where['size']} size, random weights, "
        f"{where['dtype'].removeprefix('torch.')}; the code: {code}. The reference is the published models' own code "
        "with diffusers and peft on an H100."
    )


# ----------------------------------------------------------------------------------------------------------- tables


def speed_table(found: Rows) -> str:
    """Time and memory beside the reference's and the goals."""
    lines = []
    for name, what in SPEED.items():
        if name in found:
            row = found[name]
            cells = (row.get("reference", ""), row.get("goal", ""), duration(row["median_ms"]), reserved(row))
            lines.append((what, *cells, f"`{name}`"))
    return table(("work", "reference", "goal", "time", "reserved", "row"), lines)


def memory_table(heads: tuple[str, str], shown: Mapping[str, tuple[str, str]], found: Rows) -> str:
    """What fits a small GPU."""
    lines = [
        (*words, reserved(found[name]), duration(found[name]["median_ms"]), f"`{name}`")
        for name, words in shown.items()
        if name in found
    ]
    return table((*heads, "reserved", "time", "row"), lines)


def figures(found: Rows, where: Mapping[str, str]) -> str:
    """The row of figures in README.md."""
    heads = {
        "step 4 compiled": "denoising step, 4 instances",
        "train 4 plain graph": "LoRA step, 4 instances",
        "mesh chair": "chair's latents to mesh",
        "scene": "picture of 4 objects to GLB",
        "scene fast 4 steps 4 objects": "the same with a speed adapter",
    }
    heads = {name: head for name, head in heads.items() if name in found}
    cells = [figure(found[name], memory=name.startswith("train")) for name in heads]
    device = re.sub(r" \d+GB.*", "", where["device"])
    told = f"Published size, bf16, one {device} (in brackets the reference's own code, on an H100):"
    return f"{told}\n\n{table(list(heads.values()), [cells])}\n"


def figure(row: Mapping[str, Any], memory: bool) -> str:
    """A row's time, and the reference's in brackets; with the memory of both, if wanted."""
    ours = ", ".join([duration(row["median_ms"]), *([reserved(row)] if memory else [])])
    theirs = row.get("reference", "")
    theirs = theirs if memory else re.split(r", (?=[\d.]+ GiB)", theirs)[0]
    return f"{ours} ({theirs})" if theirs else ours


def duration(milliseconds: float) -> str:
    """Three digits, and seconds from one second on."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def reserved(row: Mapping[str, Any]) -> str:
    """What torch held of the GPU."""
    return f"{row['peak_reserved_gib']:.1f} GiB" if "peak_reserved_gib" in row else "-"


# -------------------------------------------------------------------------------------------------------- sentences


def missed_goals(found: Rows) -> dict[str, float]:
    """By how much rows are slower than what was aimed at, in percent."""
    goals = {name: re.match(r"([\d.]+) (ms|s)\b", found[name].get("goal", "")) for name in SPEED if name in found}
    aims = {name: float(goal[1]) * (1000 if goal[2] == "s" else 1) for name, goal in goals.items() if goal}
    over = {name: 100 * (found[name]["median_ms"] / aim - 1) for name, aim in aims.items()}
    return {name: share for name, share in over.items() if share > 0}


def speed_sentences(found: Rows) -> list[str]:
    """What the rows say besides their times."""
    missed = ", ".join(f"`{name}` (by {share:.1f}%)" for name, share in missed_goals(found).items())
    said = [f"Goals that are not reached: {missed}." if missed else "All goals are reached."]
    if "train 4 plain dropout" in found and "train 4 plain graph" in found:
        more = 100 * (found["train 4 plain dropout"]["median_ms"] / found["train 4 plain graph"]["median_ms"] - 1)
        said.append(f"Dropout makes a step {abs(more):.1f}% {'slower' if more > 0 else 'quicker'}.")
    if "load" in found:
        cold, rates = found["load"]["notes"]["cold_ms"], found["load"]["notes"]["gib_per_second"]
        said.append(
            f"From a cold disk the checkpoint takes {cold / 1000:.2f} s, at {rates['load cold']:.2f} GiB/s; "
            f"reading the files alone goes at {rates['disk cold']:.2f} GiB/s."
        )
    if "error_fp8" in found.get("step 4 fp8", {}).get("notes", {}):
        fp8, plain = (found["step 4 fp8"]["notes"][f"error_{kind}"] for kind in ("fp8", "plain"))
        said.append(
            f"fp8 changes the velocity by {100 * fp8['velocity']:.0f}% and what guidance makes of it by "
            f"{100 * fp8['guided']:.0f}% (bf16 alone: {100 * plain['velocity']:.1f} and {100 * plain['guided']:.1f}%), "
            "for random weights. All other shortcuts are exact up to rounding."
        )
    fast = found.get("scene fast 4 steps 4 objects", {}).get("notes", {})
    if fast:
        by_part = ", ".join(f"{name} {duration(ms)}" for name, ms in fast["parts_ms"].items())
        said.append(
            f"With a speed adapter: {by_part}; merged into the base, all together {duration(fast['merged_ms'])}."
        )
    return said


def left_out(found: Rows, failed: Mapping[str, str]) -> list[str]:
    """Rows of the page that are not there, and why."""
    missing = [name for name in ROWS if name not in found]
    said = "; ".join(f"`{name}`" + (f" ({failed[name]})" if name in failed else "") for name in missing)
    return [f"Not measured in this run: {said}."] if missing else []


def preset_margins(found: Rows) -> dict[str, float]:
    """How much less the presets took than `--dry_run` estimates, as a share of the estimate."""
    rows = {name: found[f"memory {name} train"] for name in PRESETS if f"memory {name} train" in found}
    if not any("peak_reserved_gib" in row for row in rows.values()):
        return {}
    estimates = _estimates()
    return {
        name: 1 - row["peak_reserved_gib"] / estimates[name] for name, row in rows.items() if "peak_reserved_gib" in row
    }


@cache
def _estimates() -> dict[str, float]:
    """GiB that training is said to take with every preset."""
    size = SIZES["published"]()
    with torch.device("meta"):
        transformer = DiT(size.dit)
        base = sum(parameter.numel() for parameter in transformer.parameters())
        lora.inject(transformer, TrainOptions().adapter_config())
    trained = sum(parameter.numel() for parameter in lora.adapter_parameters(transformer).values())
    return estimate_presets(TrainOptions(), size.dit, base, trained, size.tokens, size.condition_tokens)


def estimate_sentences(found: Rows) -> list[str]:
    """What the presets took beside the estimates."""
    margins = sorted(round(100 * margin) for margin in preset_margins(found).values())
    if not margins:
        return ["`--dry_run` estimates the memory of the options and of every preset."]
    took = f"the presets took {margins[0]} to {margins[-1]}% less than that"
    return [f"`--dry_run` estimates the memory of the options and of every preset; {took}."]


def wrapped(sentences: Sequence[str], width: int = 118) -> str:
    """Sentences as lines of the page."""
    lines = [""]
    for word in " ".join(sentences).split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)

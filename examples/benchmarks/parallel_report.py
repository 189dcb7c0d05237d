"""What `benchmarks/distributed.py` says about its results: ratios, a table for people, and rows for a README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .parallel_training import compare_losses


def compare(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers that the cases are there for, as far as these were run."""
    by = {result["case"]: result for result in results}
    ratios = {
        "speedup_per_process": ("per process", "one", "scenes_per_second"),
        "speedup_total": ("total", "one", "scenes_per_second"),
        "speedup_balanced_per_process": ("balanced per process", "one", "scenes_per_second"),
        "speedup_balanced_total": ("balanced total", "one", "scenes_per_second"),
        "gain_of_balancing_per_process": ("balanced per process", "per process", "scenes_per_second"),
        "gain_of_balancing_total": ("balanced total", "total", "scenes_per_second"),
        "sharded_base_memory": ("sharded", "per process", "base_mib"),
        "sharded_step_time": ("sharded", "per process", "seconds_per_step"),
    }
    found = {name: by[a][key] / by[b][key] for name, (a, b, key) in ratios.items() if a in by and b in by}
    if "one" in by and "total" in by:
        losses = compare_losses(by["one"]["losses"], by["total"]["losses"])
        found["largest_difference_of_losses"] = losses["largest_difference"]
    if "same losses" in by:
        found["largest_difference_of_losses_fp32"] = by["same losses"]["largest_difference"]
    return found


def table(results: Sequence[dict[str, Any]], comparison: dict[str, float], failed: dict[str, str]) -> str:
    """For people."""
    lines = [
        f"{'case':22}{'ranks':>6}{'s/step':>9}{'scenes/s':>10}{'waiting':>9}{'sending':>9}{'base MiB':>10}{'GiB':>7}"
    ]
    for r in results:
        if "seconds_per_step" in r:
            shares = "".join(f"{100 * r[k]:8.1f}%" if k in r else " " * 9 for k in ("waiting_share", "sending_share"))
            memory = f"{r['peak_reserved_gib']:7.2f}" if "peak_reserved_gib" in r else ""
            lines.append(
                f"{r['case']:22}{r['processes']:>6}{r['seconds_per_step']:9.3f}{r['scenes_per_second']:10.2f}{shares}"
                f"{r['base_mib']:10.1f}{memory}"
            )
        for count, row in r.get("scenes", {}).items() if isinstance(r.get("scenes"), dict) else ():
            lines.append(f"{r['case']}, {count} instances: {json.dumps(row, default=float)}")
        if "without_sharding" in r:
            lines.append(f"{r['case']}: {r['limit_gib']} GiB each; without sharding: {r['without_sharding']}")
    lines += [f"{name}: {value:.3g}" for name, value in comparison.items()]
    return "\n".join([*lines, *(f"FAILED {name}: {error}" for name, error in failed.items())])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Two tables: training, and denoising in milliseconds per step and seconds per scene of 50 steps."""
    by = {result["case"]: result for result in results}
    lines = ["| training | GPUs | scenes/s | of one GPU | waiting | sending | base per GPU | peak per GPU |", _rule(8)]
    for name, r in by.items():
        if "scenes_per_second" not in r:
            continue
        comparable = "one" in by and name != "small gpus"
        ratio = f"{r['scenes_per_second'] / by['one']['scenes_per_second']:.2f}x" if comparable else "-"
        shares = [f"{100 * r[key]:.1f}%" if key in r else "-" for key in ("waiting_share", "sending_share")]
        memory = [f"{r['base_mib'] / 1024:.2f} GiB", f"{r['peak_reserved_gib']:.2f} GiB" if "device_gib" in r else "-"]
        lines.append(_row(name, r["processes"], f"{r['scenes_per_second']:.2f}", ratio, *shares, *memory))
    lines += [
        "",
        "| instances | one GPU | halves of guidance | instances shared | latents apart | bf16 from fp32 |",
        _rule(6),
    ]
    for count, row in by.get("denoising", {}).get("scenes", {}).items():
        times = {name: f"{ms:.1f} ms, {ms / 20:.2f} s" for name, ms in row["ms_per_step"].items()}
        apart = max(distance["relative"] for distance in row["distance_to_one"].values())
        rounding = row.get("distance_of_rounding", {}).get("relative")
        cells = [times.get(name, "-") for name in ("one", "guidance", "instances")]
        lines.append(_row(count, *cells, f"{apart:.1e}", "-" if rounding is None else f"{rounding:.1e}"))
    lines.append("")
    for count, row in by.get("whole scenes", {}).get("scenes", {}).items():
        one, all_of_them = row["one"]["seconds"], row["all"]["seconds"]
        lines.append(f"- picture to GLB, {count} instances: {one:.2f} s on one GPU, {all_of_them:.2f} s on all")
    return "\n".join(lines).rstrip()


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns

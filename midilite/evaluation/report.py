"""What `evaluate.py` writes and prints: the protocols it can measure by, means over scenes, and the one table.

A scene's result is {"instances", "missing_instances", "missing_truth", and per section of the protocol {key: value}},
where undefined values are None. They are left out of means, counted, and shown as "-".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.terminal import printable
from . import metrics, midi_protocol

Scenes = Mapping[str, Mapping[str, Any]]  # name -> result
COUNTS = ("instances", "missing_instances", "missing_truth")


@dataclass(frozen=True)
class Protocol:
    """A way to measure.

    Attributes:
        measure: (predicted, truth, tau, samples=, seed=) -> a scene's result.
        sections: parts of a result that hold values.
        keys: the values of each section.
        definitions: what is meant by each, with {tau} and {samples}.
        max_num_instances, min_mask_share: which instances of a scene are measured, unless options say otherwise.
    """

    measure: Callable[..., dict[str, Any]]
    sections: Sequence[str]
    keys: Sequence[str]
    definitions: Mapping[str, str]
    max_num_instances: int | None = None
    min_mask_share: float = 0.0

    def defined(self, tau: float, samples: int) -> dict[str, str]:
        """The definitions with the numbers that were used."""
        return {name: text.format(tau=tau, samples=samples) for name, text in self.definitions.items()}


PROTOCOLS = {
    "plain": Protocol(metrics.scene_metrics, metrics.ALIGNMENTS, metrics.SCENE_KEYS, metrics.DEFINITIONS),
    "midi": Protocol(
        midi_protocol.scene_metrics,
        (midi_protocol.SECTION,),
        midi_protocol.KEYS,
        midi_protocol.DEFINITIONS,
        midi_protocol.MAX_INSTANCES,
        midi_protocol.MIN_MASK_SHARE,
    ),
}


def aggregate(scenes: Sequence[Mapping[str, Any]], protocol: Protocol) -> dict[str, Any]:
    """Mean over scenes.

    Returns:
        {"scenes", COUNTS..., and per section and key {"mean", "scenes", "undefined"}}: the mean over the scenes where
        the value is defined (None if nowhere) and both numbers of scenes.
    """
    result: dict[str, Any] = {"scenes": len(scenes)} | {key: sum(scene[key] for scene in scenes) for key in COUNTS}
    for section in protocol.sections:
        result[section] = {key: _mean([scene[section][key] for scene in scenes]) for key in protocol.keys}
    return result


def _mean(values: Sequence[float | None]) -> dict[str, float | int | None]:
    defined = [value for value in values if value is not None]
    mean = math.fsum(defined) / len(defined) if defined else None
    return {"mean": mean, "scenes": len(defined), "undefined": len(values) - len(defined)}


def report(scenes: Scenes, protocol: Protocol) -> dict[str, Any]:
    """What belongs into a JSON file: every scene by name, and the mean."""
    return {"scenes": dict(scenes), "mean": aggregate(list(scenes.values()), protocol)}


# ---- the table -----------------------------------------------------------------------------------------------------


def format_table(results: Mapping[str, Scenes], protocol: Protocol, tau: float, samples: int) -> str:
    """One table of all results: a row per scene, section and model, their means, what the adapter changes.

    Args:
        results: per model ("base", and maybe "adapter", each maybe also " fitted") the scenes' results; the same scenes
            for each.
        tau, samples: as measured with; the definitions below the table name them.
    """
    rows = [["scene", "model", "aligned", "instances", "missing", *protocol.keys]]
    for name in next(iter(results.values())):
        rows += _rows(name, {kind: scenes[name] for kind, scenes in results.items()}, protocol, _cell)
    means = {kind: aggregate(list(scenes.values()), protocol) for kind, scenes in results.items()}
    rows += _rows("mean", means, protocol, _mean_cell)
    for before, after in _compared(list(means)):
        for section in protocol.sections:
            changes = [_change(means[before][section][key], means[after][section][key]) for key in protocol.keys]
            rows.append(["change", after, section, "", "", *(_cell(change, "+") for change in changes)])
    needed = [True, len(results) > 1, len(protocol.sections) > 1] + [True] * (len(rows[0]) - 3)
    rows = [[cell for cell, shown in zip(row, needed, strict=True) if shown] for row in rows]
    defined = [[name, text] for name, text in protocol.defined(tau, samples).items()]
    return "\n".join([*_aligned(rows, sum(needed[:3])), "", *_aligned(defined, 2)])


def _compared(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Which kinds of results are compared: the adapter with the base, a fitted layout with the model's own."""
    pairs = [("base", "adapter"), *((kind, f"{kind} fitted") for kind in ("base", "adapter"))]
    return [pair for pair in pairs if set(pair) <= set(kinds)]


def _rows(
    name: str, by_kind: Mapping[str, Mapping[str, Any]], protocol: Protocol, cell: Callable[[Any], str]
) -> list[list[str]]:
    return [
        [
            *(printable(name), kind, section, str(scene["instances"]), str(scene["missing_instances"])),
            *(cell(scene[section][key]) for key in protocol.keys),
        ]
        for section in protocol.sections
        for kind, scene in by_kind.items()
    ]


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Difference of two means; None unless both are defined over equally many scenes."""
    if before["mean"] is None or after["mean"] is None or before["scenes"] != after["scenes"]:
        return None
    return after["mean"] - before["mean"]


def _cell(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _mean_cell(entry: Mapping[str, Any]) -> str:
    return _cell(entry["mean"]) + (f" ({entry['scenes']})" if entry["undefined"] else "")


def _aligned(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Lines with the columns below each other: the first `names` begin there, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

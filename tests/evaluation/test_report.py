"""The one table of an evaluation: rows, means, changes, definitions, and what is undefined."""

from __future__ import annotations

import json

import numpy as np
import pytest

from midilite.evaluation.report import PROTOCOLS, aggregate, format_table, report


def scenes(protocol: str, shift: float = 0.0) -> dict:
    """One scene of two instances that were found (shifted), one where both are missing."""
    points = np.random.default_rng(0).normal(size=(2, 60, 3)).astype(np.float32)
    measure = PROTOCOLS[protocol].measure
    return {"full": measure(list(points + shift), list(points)), "empty": measure([None, None], list(points))}


def parted(text: str) -> tuple[list[str], list[str]]:
    """Lines of the table, lines of the definitions."""
    table, _, definitions = text.partition("\n\n")
    return table.splitlines(), definitions.splitlines()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_one_table_with_the_definitions_under_it(name: str) -> None:
    """Past: three tables, and no word on what the numbers are. The numbers that were used are named below."""
    protocol = PROTOCOLS[name]
    lines, definitions = parted(format_table({"base": scenes(name)}, protocol, 0.25, 321))
    several = len(protocol.sections) > 1
    heading = ["scene", *["aligned"] * several, "instances", "missing", *protocol.keys]
    assert lines[0].split() == heading and sum("instances" in line for line in lines) == 1
    rows = [line.split() for line in lines[1:]]
    expected = [[label, section] for label in ("full", "empty", "mean") for section in protocol.sections]
    assert [row[: 1 + several] for row in rows] == [row[: 1 + several] for row in expected]
    empty = rows[len(protocol.sections)]
    assert empty[1 + several :] == ["2", "2", *["-"] * len(protocol.keys)]
    assert "(1)" in lines[-1], "a mean over one of two scenes says so"
    assert any("nearer than 0.25" in line for line in definitions)
    assert any("321 on each" in line for line in definitions) == (name == "midi")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_column_and_every_alignment_is_defined(name: str) -> None:
    protocol = PROTOCOLS[name]
    words = " ".join(protocol.definitions).replace(",", "") + " " + " ".join(protocol.definitions.values())
    for key in (*protocol.sections, *protocol.keys):
        assert key in words or (key.startswith("object_") and "object_*" in words), key


def test_the_definitions_tell_the_protocols_apart() -> None:
    plain, midi = (PROTOCOLS[name].defined(0.1, 20480) for name in ("plain", "midi"))
    assert "not squared" in plain["scene_chamfer"] and "longest side of 2" in plain["object_*"]
    assert "V^T U^T" in midi["midi"] and "squared" in midi["scene_cd"] and "[-0.95, 0.95]" in midi["object_*"]
    assert "before any ICP" in midi["iou_bbox"] and "20480 on each generated surface" in midi["points"]
    assert not set(PROTOCOLS["plain"].keys) & set(PROTOCOLS["midi"].keys), "no number of one is called as of the other"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_base_and_adapter_stand_below_each_other(name: str) -> None:
    protocol = PROTOCOLS[name]
    results = {"base": scenes(name, 0.4), "adapter": scenes(name)}
    lines, _ = parted(format_table(results, protocol, 0.1, 100))
    assert [line.split()[1] for line in lines[:3]] == ["model", "base", "adapter"]
    assert len(lines) == 1 + (3 * 2 + 1) * len(protocol.sections)
    section, key = protocol.sections[0], protocol.keys[-1]
    means = [aggregate(list(results[kind].values()), protocol)[section][key]["mean"] for kind in results]
    change = next(line for line in lines if line.startswith("change"))
    assert change.split()[-1] == f"{means[1] - means[0]:+.4f}" and means[1] > means[0]


def test_means_over_different_scenes_have_no_difference() -> None:
    """A change of two means tells nothing where an instance is missing for one of the models."""

    def changes(results) -> list[list[str]]:
        lines, _ = parted(format_table(results, PROTOCOLS["plain"], 0.1, 100))
        return [line.split()[-5:] for line in lines if line.startswith("change")]

    base, adapter = scenes("plain"), scenes("plain")
    adapter["empty"] = adapter["full"]
    assert changes({"base": base, "adapter": adapter}) == [["-"] * 5] * 2
    assert changes({"base": adapter, "adapter": adapter}) == [["+0.0000"] * 5] * 2


@pytest.mark.parametrize("name", PROTOCOLS)
def test_means_count_what_is_undefined(name: str) -> None:
    protocol, measured = PROTOCOLS[name], scenes(name)
    mean = aggregate(list(measured.values()), protocol)
    assert (mean["scenes"], mean["instances"], mean["missing_instances"], mean["missing_truth"]) == (2, 4, 2, 0)
    section, key = protocol.sections[0], protocol.keys[-1]
    assert mean[section][key] == {"mean": measured["full"][section][key], "scenes": 1, "undefined": 1}
    written = json.loads(json.dumps(report(measured, protocol), allow_nan=False))
    assert written["scenes"]["empty"][section][key] is None and written["mean"] == mean
    assert aggregate([], protocol)["scenes"] == 0

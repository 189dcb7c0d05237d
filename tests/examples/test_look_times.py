"""The benchmark of looks: every look of every arrangement is timed, ratios are by plain, the sheet has all pictures."""

from argparse import Namespace

import trimesh
from benchmarks import looks
from PIL import Image


def test_looks_are_timed_by_turns_and_pictured(tmp_path, capsys):
    for i in range(2):
        trimesh.creation.box((0.5 + 0.2 * i, 0.4, 0.6)).export(tmp_path / f"box{i}.glb")
    args = Namespace(
        scenes=2, objects=2, image_size=40, seed=1, backgrounds=None, sheet=tmp_path / "sheet.png", cell=32
    )
    rows = looks.measure(tmp_path, tmp_path / "out", args)
    assert len(rows) == 2 and all(set(row) == {"plain", "studio", "room"} for row in rows)
    row = {"plain": {"cpu": 2, "wall": 4}, "studio": {"cpu": 3, "wall": 4}, "room": {"cpu": 4, "wall": 2}}
    looks.report(looks.summary([row]))
    told = capsys.readouterr().out.splitlines()
    assert "cpu 3.00 s, 1.50 times plain" in told[1] and "wall 2.00 s, 0.50 times plain" in told[2]
    looks.save_sheet(tmp_path / "out", args)
    with Image.open(args.sheet) as sheet:
        assert sheet.size == (3 * 34 + 2, 3 * 34 + 2)

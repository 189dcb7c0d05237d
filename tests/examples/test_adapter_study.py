"""The study of adapters runs from end to end, small: every number is there, and finished runs are kept."""

import json

from adapter_study import run as study
from adapter_study import work
from PIL import Image


def rounded(rows):
    """To six digits: other processes may use more threads, which add up in another order."""
    return json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 6))


def test_both_studies_run_and_a_repeated_command_trains_nothing_anew(tmp_path, quick_model, capsys, monkeypatch):

    arguments = f"""--pretrained_model {quick_model} --output {tmp_path} --kinds LoRA PiSSA
        --ranks 2 --mix_rank 2 --learning_rates 1e-3 --steps 2 --batch_size 2 --eval_scenes 1
        --num_tokens 8 --made_scenes 4 --made_points 64 --mixes 0 1 --device cpu""".split()
    assert study.main(arguments) == 0
    document = json.loads((tmp_path / "report" / "study.json").read_text())
    kinds, mixes = document["kinds"], document["mixes"]
    assert [row["kind"] for row in kinds] == ["base", "LoRA", "PiSSA"]
    assert kinds[1]["weights"] == kinds[2]["weights"] > 0 and len({row["loss"] for row in kinds}) == 3
    assert [row["mixture"] for row in mixes] == ["base", "1 A + 0 B", "0 A + 1 B", "A + B"]
    assert mixes[0]["A"]["loss"] == kinds[0]["loss"] and mixes[1]["A"]["loss"] == kinds[1]["loss"]
    assert mixes[1]["B"]["loss"] != mixes[0]["B"]["loss"] != mixes[2]["B"]["loss"]
    with Image.open(tmp_path / "report" / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * work.PICTURE and sheet.height > work.PICTURE
    monkeypatch.setattr(work, "train_lora", None)  # it would fail
    assert study.main(arguments) == 0
    assert json.loads((tmp_path / "report" / "study.json").read_text()) == document
    assert study.main([*arguments, "--workers", "2"]) == 0  # measured in other processes, and not trained there either
    again = json.loads((tmp_path / "report" / "study.json").read_text())
    assert rounded(again["kinds"]) == rounded(kinds) and rounded(again["mixes"]) == rounded(mixes)
    capsys.readouterr()
    assert study.main([*arguments, "--batch_size", "1"]) == 1
    assert "was trained with other settings" in capsys.readouterr().err

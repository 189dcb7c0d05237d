"""The chart of losses in fine_tune.md comes from a script."""

from curves import main
from golden_files import GOLDEN
from PIL import Image


def test_the_script_draws_a_chart_and_says_where_validation_was_lowest(tmp_path):
    """In four steps of the golden model."""
    picture = tmp_path / "curves.png"
    few = {"max_train_steps": 4, "validate_every": 2, "lr_warmup_steps": 0, "num_tokens": 16, "batch_size": 1}
    found = main(tmp_path / "run", picture, pretrained_model=str(GOLDEN / "midi_tiny" / "checkpoint"), **few)
    assert found["last_step"] == 4 and found["lowest_step"] in (0, 2, 4) and 0 < found["lowest"] <= found["last"]
    with Image.open(picture) as chart:
        assert chart.width > chart.height > 200

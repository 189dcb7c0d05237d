"""Adapters that read base weights while a base is split over two processes: the same training as in one process."""

import pytest
from training_runs import assert_same_training, text

KINDS = {
    "dora": ["--use_dora"],
    "dora, all linears, checkpointed": ["--use_dora", "--lora_target_modules", "*", "--gradient_checkpointing"],
    "pissa": ["--lora_init", "pissa", "--use_rslora"],
    "all, with validation": ["--use_dora", "--lora_init", "pissa", "--val_fraction", 0.2, "--validate_every", 5],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_base_trains_the_same_adapter(forks, flags, tmp_path, kind):
    """DoRA's norms read the weights of a block while they are gathered; PiSSA's start and DoRA's magnitudes are taken
    before the split."""
    common = ["--max_train_steps", 10, *KINDS[kind]]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(one, *common, "--batch_size", 4)) == 0, log.read_text()
    codes = forks.run_group("train", log, arguments=flags(two, *common, "--batch_size", 2, "--shard_base"))
    assert codes == [0, 0], text(log, 0) + text(log, 1)
    assert_same_training(two, one)

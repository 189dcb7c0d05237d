"""The study of fine-tuning: what it compares, that a cell trains what it says, and its table."""

from dataclasses import replace

import torch
from tiny_model import tuning_stage
from tiny_model.networks import Networks, toy_sizes
from tiny_model.tuning_cells import RANKS, RATES, SCENES, SEEDS, Cell, cells
from tiny_model.tuning_stage import cell_task, choices, key_of, scatter, seeds_told, trainer_options

from midilite import lora
from midilite.common.distributed import World
from midilite.data.features import Features
from midilite.training.trainer import Trainer, find_start


def test_every_cell_is_there_once():
    keys = [key_of(cell) for cell in cells()]
    assert len(set(keys)) == len(keys)
    named = {cell.name for cell in cells()}
    assert {Cell(n, r, rate).name for n in SCENES for r in RANKS for rate in RATES} <= named
    for name in {c.name for c in cells() if c.scenes == 64 and c.rate == 1e-3 and not c.reversed_sign}:
        assert {c.seed for c in cells() if c.name == name} == set(SEEDS), "what is claimed has all seeds"


def toy_domain(networks, scenes):
    """Scenes of two instances of random latents."""
    sizes, generator = networks.sizes, torch.Generator().manual_seed(0)
    config = sizes.dit

    def features(i):
        clip = torch.randn(2, 1, config.cross_attention_dim, generator=generator)
        dinov2 = torch.randn(2, 17, config.cross_attention_2_dim, generator=generator)
        mean = torch.randn(2, sizes.width, config.in_channels, generator=generator)
        return Features(clip, dinov2, mean, torch.zeros_like(mean) - 9, torch.ones(2))

    return tuning_stage.Domain([features(i) for i in range(scenes)], *[None] * 4)


def test_a_cell_trains_its_scenes_and_its_targets(tmp_path):
    networks = Networks.fresh(toy_sizes(), "cpu", 1)
    torch.nn.init.normal_(networks.dit.proj_out.weight, std=0.1)  # starts from zero, and passes no gradient then
    domain = toy_domain(networks, 6)
    cell = Cell(scenes=4, rank=2, targets=("to_q",), average=0.5, steps=2, logit_mean=1.0)
    task = cell_task(networks, domain, cell)
    assert task.num_scenes == 4 and all(".to_q." in key for key in task.parameters)
    assert (task.settings.logit_mean, task.settings.condition_dropout) == (1.0, 0.1)
    options = trainer_options(cell, tmp_path)
    trainer = Trainer(task, options, World(), torch.device("cpu"))
    trainer.train(find_start(options, World()))
    assert trainer.update.ema is not None
    assert any(v.abs().max() > 0 for k, v in task.parameters.items() if "lora_B" in k)
    whole = cell_task(Networks.fresh(toy_sizes(), "cpu", 1), domain, replace(cell, rank=0))
    assert len(whole.parameters) > len(task.parameters) and not lora.adapter_names(whole.dit)


def test_the_mistake_is_the_negated_target():
    networks = Networks.fresh(toy_sizes(), "cpu", 1)
    domain = toy_domain(networks, 2)
    right = cell_task(networks, domain, Cell(scenes=2, rank=0)).draw([0, 1], 3)
    wrong = cell_task(networks, domain, Cell(scenes=2, rank=0, reversed_sign=True)).draw([0, 1], 3)
    for a, b in zip(right.scenes, wrong.scenes, strict=True):
        assert torch.equal(a.target, -b.target) and torch.equal(a.noised, b.noised)


def rows_of(cell, values):
    """The base and this cell with one seed for each value of scene F on furniture."""
    measured = {"loss": 0.9, "scene_f_score": 0.8, "object_f_score": 0.6}
    sets = {name: measured for name in ("unseen_arrangements", "unseen_vehicles", "furniture")}
    rows = {"base": {"name": "base", **sets}}
    for seed, value in enumerate(values):
        better = {**sets, "furniture": {**measured, "scene_f_score": value}}
        rows[key_of(replace(cell, seed=seed))] = {"name": cell.name, **better}
    return rows


def test_choices_are_means_over_seeds():
    found = choices(rows_of(Cell(), (0.8, 0.85, 0.9)))[Cell().name]
    assert found["seeds"] == 3 and found["furniture"]["scene_f_score"] == 0.85
    assert found["furniture"]["scene_f_score_error"] == 0.0289  # their deviation by the root of three


def test_two_seeds_tell_no_error():
    found = choices(rows_of(Cell(), (0.8, 0.9)))[Cell().name]
    assert found["furniture"]["scene_f_score"] == 0.85 and "scene_f_score_error" not in found["furniture"]


def test_what_chance_does_is_told_by_the_choices_with_several_seeds():
    rows = (
        rows_of(Cell(), (0.8, 0.85, 0.9)) | rows_of(Cell(rank=4), (0.7, 0.7, 0.73)) | rows_of(Cell(rank=64), (0.1, 0.9))
    )
    found = scatter(rows, "furniture")
    assert (found.choices, round(found.farthest, 6)) == (2, 0.05)
    assert abs(found.deviation - ((0.05**2 + 0.0003) / 2) ** 0.5) < 1e-9, "the mean of both variances"


def test_the_number_of_seeds_in_words():
    assert seeds_told([{"seeds": 1}, {"seeds": 1}]) == "1 seed each" and seeds_told([{"seeds": 3}]) == "3 seeds each"
    assert seeds_told([{"seeds": n} for n in (3, 1, 3, 1)]) == "2 choices with 1 seed, 2 with 3 seeds"
    assert seeds_told([{"seeds": n} for n in (3, 1)]) == "1 choice with 1 seed, 1 with 3 seeds"

"""A transformer with two more blocks: the same function, in which the new blocks can learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model.deeper import deepen
from tiny_model.flow_stages import start_networks
from tiny_model.networks import Networks, toy_sizes
from tiny_model.stages import Stage, toy_plan
from torch import Tensor

from midilite.common.distributed import World
from midilite.model.config import DiTConfig
from midilite.model.dit import Block, DiT

GROUPS, UNCONDITIONAL = (3, 1, 2), 2  # six samples, the first two of a group of three have no conditions
NEW = (2, 4)  # of seven blocks made of five


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(layers: int = 5, multi_instance_blocks: tuple[int, ...] = (1, 2)) -> DiTConfig:
    return dataclasses.replace(toy_sizes().dit, num_layers=layers, multi_instance_blocks=multi_instance_blocks)


@torch.no_grad()
def small_dit(layers: int = 5, multi_instance_blocks: tuple[int, ...] = (1, 2)) -> DiT:
    """Random weights; norms after skip connections are no identities, and some of their weights are negative."""
    torch.manual_seed(0)
    dit = DiT(config(layers, multi_instance_blocks))
    for block in dit.blocks[layers // 2 + 1 :]:
        norm = block.skip_norm
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape))
        norm.weight[::3] *= -1
        norm.bias.normal_()
    return dit


def inputs(sizes: DiTConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [6, 5, C] and timesteps [6], both different for each, and the conditions [4, 3, E] and [4, 7, E]."""
    g, samples = generator(), sum(GROUPS)
    return (
        torch.randn(samples, 5, sizes.in_channels, generator=g),
        torch.linspace(30, 970, samples),
        torch.randn(samples - UNCONDITIONAL, 3, sizes.cross_attention_dim, generator=g),
        torch.randn(samples - UNCONDITIONAL, 7, sizes.cross_attention_2_dim, generator=g),
    )


def velocity(dit: DiT, groups: tuple[int, ...] | None = GROUPS) -> Tensor:
    """[6, 5, C] of samples of which some have no conditions."""
    latents, timesteps, *conditions = inputs(dit.config)
    projected = dit.project_conditions(*conditions, unconditional=UNCONDITIONAL)
    return dit(latents, timesteps, projected, groups=groups)


def close(first: Tensor, second: Tensor) -> bool:
    """In fp32, of values around 1: they differ by some 1e-5, mostly because the norm's epsilon is added twice."""
    return torch.allclose(first, second, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers, had, wanted", [(3, (1,), (2,)), (3, (1,), (1, 2, 3)), (5, (1, 2), (1, 2, 3)),
                                                 (5, (1, 2, 3), (1, 3, 5)), (7, (), ())])  # fmt: skip
def test_the_deeper_one_computes_the_same(layers, had, wanted):
    """With groups and without, whichever of the new blocks see whole groups."""
    dit = small_dit(layers, had)
    deeper = deepen(dit, wanted)
    for groups in (GROUPS, None):
        expected = velocity(dit, groups)
        assert expected.std() > 0.1 and close(velocity(deeper, groups), expected)
    assert close(velocity(dit), velocity(dit, None)) == (not had), "groups change something"
    assert deeper.multi_instance_blocks == set(wanted) and deeper.config.num_layers == layers + 2


@torch.no_grad()
@pytest.mark.parametrize("number", NEW)
@pytest.mark.parametrize("name", ["attn1.to_out.0", "attn2.to_out.0", "attn2_2.to_out.0", "ff.net.2"])
def test_a_new_block_takes_part_in_the_function(number, name):
    """Once one of its output linears is no longer zero."""
    dit = small_dit()
    deeper = deepen(dit, (1, 2, 3, 4))
    deeper.blocks[number].get_submodule(name).weight.normal_(generator=generator())
    assert not close(velocity(deeper), velocity(dit))


@torch.no_grad()
def test_a_changed_norm_after_a_skip_connection_is_noticed():
    """The comparison could tell the norm's two halves of the new path apart."""
    dit = small_dit()
    for number in (NEW[1], NEW[1] + 1):
        deeper = deepen(dit, (1, 3))
        assert close(velocity(deeper), velocity(dit))
        deeper.blocks[number].skip_norm.weight.mul_(torch.linspace(1, 1.2, dit.config.width))
        assert not close(velocity(deeper), velocity(dit))


def test_new_blocks_learn():
    """What they add gets gradients at once, everything else in them as soon as they add something."""
    deeper = deepen(small_dit(), (1, 2, 3, 4))
    outputs = ("to_out", "ff.net.2")

    def step() -> Iterator[tuple[str, Tensor]]:
        deeper.zero_grad()
        velocity(deeper).square().mean().backward()
        return ((f"{i}.{k}", p.grad) for i in NEW for k, p in deeper.blocks[i].named_parameters())

    for key, grad in step():
        learns = any(name in key for name in outputs) or "skip" in key
        assert grad.any() == learns, key
    torch.optim.SGD(deeper.parameters(), lr=0.1).step()
    assert all(grad.any() for _, grad in step())


def test_what_is_there_stays_and_two_blocks_come_on_top():
    dit = small_dit()
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    deeper = deepen(dit, (1, 3))
    count, more, most = (sum(p.numel() for p in network.parameters()) for network in
                         (dit, Block(dit.config, skip=False), Block(dit.config, skip=True)))  # fmt: skip
    assert sum(p.numel() for p in deeper.parameters()) == count + more + most
    assert all(p.requires_grad for p in deeper.parameters())
    assert all(torch.equal(value, before[key]) for key, value in dit.state_dict().items())
    for old, new in enumerate((0, 1, 3, 5, 6)):
        kept, block = dit.blocks[old].state_dict(), deeper.blocks[new].state_dict()
        changed = {key for key, value in kept.items() if not torch.equal(value, block[key])}
        assert changed == ({"skip_linear.weight", "skip_linear.bias"} if new == 5 else set())
    assert all(torch.equal(value, before[key]) for key, value in deeper.state_dict().items() if "blocks" not in key)


def test_one_block_is_too_few():
    with pytest.raises(ValueError, match="has 1 blocks, only an odd number of 3 or more can be deepened"):
        deepen(small_dit(1, ()), ())


@pytest.mark.parametrize("wanted", [(), (1,), (1, 2), (1, 3, 5), (0, 1, 3)])
def test_multi_instance_blocks_that_would_change(wanted):
    with pytest.raises(ValueError) as error:
        deepen(small_dit(), wanted)
    said = f"multi-instance blocks [1, 3] of 7 have to stay and [2, 4] may be some, too, but {list(wanted)} are wanted"
    assert said in str(error.value)


@pytest.mark.parametrize("weight", [0.0, 5e-3, -5e-3])
def test_a_norm_that_can_not_be_undone(weight):
    """Only the one that the new block takes over: the last block's may be anything."""
    dit = small_dit()
    with torch.no_grad():
        dit.blocks[4].skip_norm.weight[7] = weight
    deepen(dit, (1, 3))
    with torch.no_grad():
        dit.blocks[3].skip_norm.weight[7] = weight
    with pytest.raises(ValueError, match="norm after a skip connection has a weight of ") as error:
        deepen(dit, (1, 3))
    assert str(error.value).endswith(f" {abs(weight):.1e}")


@torch.no_grad()
def test_a_model_folder_of_two_blocks_less_is_deepened(tmp_path: Path):
    """And one of as many blocks as planned is left as it is."""
    plan, small = toy_plan(), Networks.fresh(toy_sizes(), "cpu", 0)
    small.dit = small_dit(3, (1,))  # a fresh one's velocity is 0
    small.save(tmp_path / "model", torch.float32)
    planned = dataclasses.replace(plan, sizes=dataclasses.replace(plan.sizes, dit=config(5, (1, 2, 3))))
    for chosen, layers, blocks in ((planned, 5, {1, 2, 3}), (plan, 3, {1})):
        stage = Stage(tmp_path, chosen, World(), torch.device("cpu"), 0.0)
        networks = start_networks(stage, tmp_path / "model")
        assert networks.dit.config.num_layers == layers and networks.dit.multi_instance_blocks == blocks
        assert close(velocity(networks.dit), velocity(small.dit))
        for part in ("vae", "dinov2", "clip"):
            kept = getattr(networks, part).state_dict()
            assert all(torch.equal(v, kept[k]) for k, v in getattr(small, part).state_dict().items())
    assert planned.sizes.dit.multi_instance_blocks == (1, 2, 3)


def test_a_model_folder_of_any_other_number_of_blocks_is_refused(tmp_path: Path):
    """Past bug: it was trained as it was, and shipped with another number of blocks than planned."""
    plan, other = toy_plan(), Networks.fresh(toy_sizes(), "cpu", 0)
    stage = Stage(tmp_path, plan, World(), torch.device("cpu"), 0.0)
    for layers in (5, 7):
        other.dit = small_dit(layers, (1,))
        other.save(tmp_path / "model", torch.float32)
        with pytest.raises(ValueError, match=rf"its transformer has {layers} blocks, expected 3, or 1 to deepen"):
            start_networks(stage, tmp_path / "model")


def test_the_shipped_vae_does_not_suit_other_sizes(tmp_path: Path):
    stage = Stage(tmp_path, toy_plan(), World(), torch.device("cpu"), 0.0)
    with pytest.raises(ValueError, match="vae.safetensors: is missing, and the shipped VAE has other sizes"):
        start_networks(stage, None)

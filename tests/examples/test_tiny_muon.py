"""Muon on fused weights is torch's Muon on the matrices that they are made of."""

from __future__ import annotations

import pytest
import torch
from tiny_model.muon import Muon, block_matrices, join, orthogonal, split
from tiny_model.networks import Networks, toy_sizes

from midilite.model.layers import split_heads, split_interleaved, split_stacked


@pytest.fixture(scope="module")
def parts():
    networks = Networks.fresh(toy_sizes(), "cpu", 0)
    return {"transformer": networks.dit, "dinov2": networks.dinov2, "clip": networks.clip}


def named(parts):
    return {f"{name}.{key}": p for name, network in parts.items() for key, p in network.named_parameters()}


def test_every_matrix_of_a_block_is_there_and_nothing_else(parts):
    found, all_of_them = block_matrices(parts), named(parts)
    blocks = [k for k, p in all_of_them.items() if p.ndim == 2 and (".blocks." in k or ".encoder.layer" in k)]
    assert sorted(found) == sorted(blocks) and len(found) > 30
    assert found["transformer.blocks.0.attn1.qkv.weight"] == (4, 3)
    assert found["transformer.blocks.0.attn2_2.kv.weight"] == (4, 2)
    assert found["dinov2.encoder.layer.0.attention.attention.qkv.weight"] == (1, 3)
    assert found["clip.vision_model.encoder.layers.0.self_attn.qkv.weight"] == (1, 3)
    assert found["transformer.blocks.2.skip_linear.weight"] == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize("heads, count, by_head", [(4, 3, True), (4, 2, True), (4, 3, False)])
def test_parts_are_the_projections_that_attention_uses(heads, count, by_head):
    """The library's head split of the fused product is the product with each matrix."""
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(32 * count, 24, generator=g), torch.randn(2, 5, 24, generator=g)
    layout = (heads, count) if by_head else (1, count)
    matrices = split(weight, layout)
    assert matrices.shape == (count, 32, 24) and torch.equal(join(matrices, layout), weight)
    for part, used in zip(matrices, (split_interleaved if by_head else split_stacked)(x @ weight.T, heads, count),
                          strict=True):  # fmt: skip
        assert torch.allclose(split_heads(x @ part.T, heads), used, atol=1e-5)


def test_the_layouts_are_those_of_the_networks(parts):
    """Scaling what the layout says is the value projection scales what attention gives, in each kind of block."""
    g = torch.Generator().manual_seed(2)
    found = block_matrices(parts)
    cases = (
        ("transformer.blocks.1.attn1", lambda m, x: m.project(x)[2], "qkv"),
        ("transformer.blocks.1.attn2_2", lambda m, x: m.project(x)[1], "kv"),
        ("dinov2.encoder.layer.0.attention", lambda m, x: m(x) - m.output["dense"].bias, "attention.qkv"),
        ("clip.vision_model.encoder.layers.0.self_attn", lambda m, x: m(x) - m.out_proj.bias, "qkv"),
    )
    for path, values, name in cases:
        network, _, rest = path.partition(".")
        module = parts[network].get_submodule(rest)
        linear = module.get_submodule(name)
        x = torch.randn(2, 5, linear.in_features, generator=g)
        if linear.bias is not None:
            torch.nn.init.zeros_(linear.bias)
        with torch.no_grad():
            before, layout = values(module, x), found[f"{path}.{name}.weight"]
            matrices = split(linear.weight, layout)
            matrices = torch.cat([matrices[:-1], 3 * matrices[-1:]])
            linear.weight.copy_(join(matrices, layout))
            assert torch.allclose(values(module, x), 3 * before, atol=1e-5), path


def test_matrices_become_orthogonal():
    made = orthogonal(torch.randn(3, 48, 16, generator=torch.Generator().manual_seed(3)))
    values = torch.linalg.svdvals(made.float())
    assert made.shape == (3, 48, 16) and values.min() > 0.5 and values.max() < 1.3


def test_steps_are_those_of_torch_s_optimizers():
    """Ten steps of a fused weight, a plain one, a bias and one without a gradient; the oracle sees q, k and v apart."""
    g = torch.Generator().manual_seed(4)
    shapes = {"qkv": (48, 16), "plain": (8, 16), "bias": (16,), "idle": (4, 4)}
    ours = {k: torch.nn.Parameter(torch.randn(s, generator=g)) for k, s in shapes.items()}
    layouts = {"qkv": (2, 3), "plain": (1, 1), "idle": (1, 1)}
    optimizer = Muon(ours, layouts, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    apart = {k: [torch.nn.Parameter(m.clone()) for m in split(ours[k].data, layouts[k])] for k in layouts}
    bias = torch.nn.Parameter(ours["bias"].data.clone())
    matrices = [p for pieces in apart.values() for p in pieces]
    oracles = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([bias], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)),
    ]
    start = {k: p.detach().clone() for k, p in ours.items()}
    for _ in range(10):
        for key in ("qkv", "plain", "bias"):
            ours[key].grad = torch.randn(shapes[key], generator=g)
        for key in ("qkv", "plain"):
            for piece, grad in zip(apart[key], split(ours[key].grad, layouts[key]), strict=True):
                piece.grad = grad.clone()
        bias.grad = ours["bias"].grad.clone()
        optimizer.step()
        for oracle in oracles:
            oracle.step()
    for key in ("qkv", "plain"):
        expected = join(torch.stack([p.detach() for p in apart[key]]), layouts[key])
        moved = (expected - start[key]).norm()
        assert (ours[key] - expected).norm() < 0.01 * moved and moved > 0.1, key  # bf16 adds up in another order
    assert torch.equal(ours["bias"], bias) and torch.equal(ours["idle"], start["idle"])


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_a_bad_step_that_is_queued_changes_nothing(kind):
    g = torch.Generator().manual_seed(5)
    parameters = {k: torch.nn.Parameter(torch.randn(8, 8, generator=g)) for k in ("matrix", "table")}
    optimizer = Muon(parameters, {"matrix": (1, 1)}, lr=1e-2, weight_decay=0.1, fused=True)

    def step(bad):
        for p in parameters.values():
            p.grad = torch.full((8, 8), float(kind)) if bad else torch.randn(8, 8, generator=g)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        del optimizer.found_inf
        state = [optimizer.state[p]["exp_avg"].clone() for p in parameters.values()]
        return [p.detach().clone() for p in parameters.values()] + state

    first, second, third = step(False), step(True), step(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(second, third, strict=True))

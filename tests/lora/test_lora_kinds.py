"""DoRA, PiSSA's start, and which modules names mean: against peft's layers and exact decompositions."""

import dataclasses
import json

import pytest
import torch
from adapter_kinds import KINDS, run, scramble
from golden_files import GOLDEN, golden_dit, relative_error
from peft_pair import Fused, Plain, copy_base, peft_pair
from plain_dit import PlainDiT
from safetensors.torch import load_file

from midilite import lora
from midilite.lora.config import LoRAConfig, exported_config, match_targets, matches
from midilite.lora.layers import principal_factors
from midilite.model.layers import Linear

ALL = ("*",)


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_of_every_kind_changes_nothing_bit_for_bit(midi_dit, midi_golden, kind, dtype):
    model = midi_dit.to(dtype)
    before = run(model, midi_golden)
    lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=ALL, dropout=0.5))
    assert torch.equal(run(model, midi_golden), before)
    model.train()
    assert torch.equal(run(model, midi_golden), before)  # nor does dropout


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_in_fp32_and_bf16(midi_golden, kind):
    """fp32: rounding. bf16: one rounding of the merged weights, no worse than rounding the base itself is."""
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        for merged in (False, True):
            model = golden_dit("midi_tiny").bfloat16().to(dtype)  # one base: PiSSA starts from its bits
            lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=ALL))
            scramble(model)
            lora.set_adapters(model, {"default": 0.7})
            if merged:
                lora.merge_adapters(model)
                assert not lora.slots(model)
            models[dtype, merged] = run(model, midi_golden).float()
    exact, base = models[torch.float32, False], run(golden_dit("midi_tiny").bfloat16().float(), midi_golden)
    assert relative_error(models[torch.float32, True], exact) < 1e-5 < relative_error(exact, base) / 100
    rounding = relative_error(run(golden_dit("midi_tiny").bfloat16(), midi_golden).float(), base)
    for merged in (False, True):
        assert relative_error(models[torch.bfloat16, merged], exact) < 3 * rounding


@torch.no_grad()
def test_merging_rounds_once():
    """The merged bf16 weight is the fp64 sum, rounded; adding to a rounded sum or in bf16 would differ somewhere."""
    for kind in KINDS.values():
        torch.manual_seed(0)
        linear = Linear(48, 32).bfloat16()
        model = torch.nn.ModuleDict({"a": linear})
        for name in ("one", "two"):
            lora.inject(model, dataclasses.replace(kind, target_modules=("a",)), name)
            scramble(model, name, seed=len(name))
        lora.set_adapters(model, {"one": 0.5, "two": -0.25})
        one, two = (lora.adapters_named(model, name)[0].delta(linear).double() for name in ("one", "two"))
        expected = (linear.weight.double() + 0.5 * one - 0.25 * two).bfloat16()
        lora.merge_adapters(model)
        differs = (linear.weight != expected).float().mean()  # fp32 sums may fall on the other side of a tie
        assert differs < 0.01


@torch.no_grad()
def test_one_hundred_cycles_of_mixed_kinds_leave_every_base_bit(midi_dit):
    base = {key: value.clone() for key, value in midi_dit.state_dict().items()}
    small = {"rank": 2, "target_modules": ("attn1.to_q", "ff.net.2"), "rank_pattern": {}}
    for i in range(100):
        for j, (name, config) in enumerate(KINDS.items()):
            if (i + j) % 5 < 2:
                lora.inject(midi_dit, dataclasses.replace(config, **small), name)
                scramble(midi_dit, name)
        midi_dit(torch.zeros(1, 2, 8), torch.ones(1), torch.zeros(1, 1, 24), torch.zeros(1, 3, 40)) if i == 50 else None
        lora.remove_adapters(midi_dit)
    assert all(torch.equal(base[key], value) for key, value in midi_dit.state_dict().items())
    assert not lora.slots(midi_dit)


@torch.no_grad()
def test_kinds_mix_linearly_and_in_any_order():
    """In one linear; every adapter sees the base's output, so a DoRA before or after a LoRA makes no difference."""
    torch.manual_seed(0)
    x, linear = torch.randn(5, 24), Linear(24, 16)
    model = torch.nn.ModuleDict({"a": linear})
    for name, config in KINDS.items():
        lora.inject(model, dataclasses.replace(config, target_modules=("a",)), name)
        scramble(model, name)
    lora.set_adapters(model, {})
    base, changes = linear(x), {}
    for name in KINDS:
        lora.set_adapters(model, {name: 1.0})
        changes[name] = linear(x) - base
        lora.set_adapters(model, {name: 0.0})
        assert torch.equal(linear(x), base)  # DoRA too
    weights = {name: 0.5 - 0.3 * i for i, name in enumerate(KINDS)}
    for order in (weights, dict(reversed(weights.items()))):
        lora.set_adapters(model, order)
        assert relative_error(linear(x), base + sum(w * changes[name] for name, w in weights.items())) < 1e-5
    with lora.temporary_weights(model, 0.5):
        assert relative_error(linear(x), base + sum(w / 2 * changes[n] for n, w in weights.items())) < 1e-5
        assert lora.active_weights(model) == {name: w / 2 for name, w in order.items()}
    with lora.temporary_weights(model, {"dora": 2.0}):
        assert relative_error(linear(x), base + 2 * changes["dora"]) < 1e-5
    with pytest.raises(KeyboardInterrupt), lora.without(model, "dora"):
        assert lora.active_weights(model) == {name: w for name, w in order.items() if name != "dora"}
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no adapter named 'x'"), lora.temporary_weights(model, {"x": 1.0}):
        pass
    assert lora.active_weights(model) == order


# --- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_s_outputs_and_gradients_equal_peft_s(rslora):
    """The norm must be detached: with it in the graph the gradients of A and B differ, the outputs don't."""
    theirs, ours = peft_pair(use_dora=True, use_rslora=rslora)
    with torch.no_grad():  # magnitudes away from where they start
        for module in theirs.modules():
            if hasattr(module, "lora_magnitude_vector") and module.lora_magnitude_vector:
                module.lora_magnitude_vector["default"].weight.mul_(torch.rand(8) + 0.5)
    peft = pytest.importorskip("peft")
    state = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(theirs).items()}
    lora.load_adapter_state(ours, state)
    x = torch.randn(5, 8)
    assert relative_error(ours(x), theirs(x)) < 1e-6
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = {}
    for key, p in theirs.named_parameters():
        if p.grad is not None:
            name = key.removeprefix("base_model.model.").replace(".default", "")
            gradients[name.replace("vector.weight", "vector")] = p.grad
    parameters = lora.adapter_parameters(ours)
    assert gradients.keys() == parameters.keys() and len(parameters) == 9
    for key, parameter in parameters.items():
        assert relative_error(parameter.grad, gradients[key]) < 1e-5, key


def test_dora_with_dropout_drops_as_peft_does():
    """The base's part sees the dropped input too. One linear each, so that the same random numbers are drawn."""
    theirs, ours = peft_pair(use_dora=True, dropout=0.4)
    theirs, ours = theirs.base_model.model.to_out[0].train(), ours.to_out[0].train()
    x = torch.randn(64, 8)
    outputs = []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(layer(x))
    assert relative_error(outputs[1], outputs[0]) < 1e-6
    assert relative_error(ours.eval()(x), outputs[0]) > 1e-2


def test_a_row_of_zeros_stays_finite():
    linear = Linear(6, 4)
    with torch.no_grad():
        linear.weight[2] = 0
    model = torch.nn.ModuleDict({"a": linear})
    lora.inject(model, LoRAConfig(rank=2, target_modules=("a",), use_dora=True))
    linear(torch.randn(3, 6)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lora.adapter_parameters(model).values())


# --- PiSSA ------------------------------------------------------------------------------------------------------------


def test_principal_factors_equal_the_exact_decomposition():
    """On a decaying spectrum (as trained weights have), and exactly where there is nothing to leave out."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40)).Q for n in (96, 64))
    weight = (u * 0.8 ** torch.arange(40)) @ v.T
    a, b = principal_factors(weight, 5, "x")
    left, s, right = torch.linalg.svd(weight)
    assert a.shape == (5, 64) and b.shape == (96, 5)
    assert relative_error(b @ a, (left[:, :5] * s[:5]) @ right[:5]) < 1e-5
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))  # the values are shared out evenly
    small = torch.randn(10, 30)
    a, b = principal_factors(small, 10, "x")
    assert relative_error(b @ a, small) < 1e-5
    with pytest.raises(ValueError, match=r"y: rank 11 is larger than a side of its weight \(10 x 30\)"):
        principal_factors(small, 11, "y")


def test_pissa_trains_like_peft_s_on_a_base_that_stays():
    """The same start, output and gradients as peft's PiSSA, which moves the principal part out of the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs, ours = Plain(), Fused()
    copy_base(theirs, ours)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    targets = ["to_q", "to_v", "to_out.0"]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="pissa")
    )
    lora.inject(ours, LoRAConfig(3, 6, target_modules=tuple(targets), init="pissa"))
    lora.freeze_base(ours)
    x, losses = torch.randn(7, 8), []
    groups = ([p for p in theirs.parameters() if p.requires_grad], list(lora.adapter_parameters(ours).values()))
    optimizers = [torch.optim.SGD(group, lr=1e-3) for group in groups]
    for _ in range(5):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            loss = model(x).sub(1).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4) and losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(midi_golden, rslora):
    config = LoRAConfig(3, 5, init="pissa", use_rslora=rslora, rank_pattern={"to_v": 2}, alpha_pattern={"to_k": 4})
    trained, reader = golden_dit("midi_tiny"), golden_dit("midi_tiny")
    lora.inject(trained, config)
    scramble(trained)
    plain = exported_config(config)
    assert (plain.rank, plain.rank_pattern, plain.init) == (6, {"to_v": 4}, "kaiming")
    lora.inject(reader, plain)
    lora.load_adapter_state(reader, lora.adapter_state(trained))
    assert relative_error(run(reader, midi_golden), run(trained, midi_golden)) < 1e-5


def test_pissa_s_start_repeats_and_knows_its_module(midi_dit):
    first, second = golden_dit("midi_tiny"), golden_dit("midi_tiny")
    for model in (first, second):
        lora.inject(model, KINDS["pissa"], seed=int(model is second))
    one, two = lora.adapter_parameters(first), lora.adapter_parameters(second)
    assert all(torch.equal(one[key], two[key]) for key in one)  # it belongs to the base, not to the seed
    assert all(not torch.any(v) for k, v in lora.adapter_state(first).items() if "lora_B" in k and v[:, :4].any())


def test_a_rank_too_large_for_pissa_leaves_the_model_alone(midi_dit):
    with pytest.raises(ValueError, match="proj_in: rank 40 is larger than a side"):
        lora.inject(midi_dit, LoRAConfig(40, 40, target_modules=("to_q", "proj_in"), init="pissa"))
    assert not lora.slots(midi_dit)


# --- names ------------------------------------------------------------------------------------------------------------


def dotted(model):
    return list(lora.named_linears(model))


def test_targets_by_name_range_and_pattern(midi_dit):
    paths = dotted(midi_dit)
    found = lambda *targets: set(match_targets(paths, targets))  # noqa: E731
    assert found("to_q") == {p for p in paths if p.rpartition(".")[2] == "to_q"}
    assert found("blocks.1-3.attn1.to_q") == {f"blocks.{i}.attn1.to_q" for i in (1, 2, 3)}
    assert found("blocks.*.ff.*") == {f"blocks.{i}.ff.net.{n}" for i in range(5) for n in ("0.proj", "2")}
    assert found("attn2*") == {p for p in paths if ".attn2." in p or ".attn2_2." in p}
    assert found("attn2.*") == {p for p in paths if ".attn2." in p}
    assert found("*") == set(paths) and len(paths) > 60
    assert found("skip_linear", "proj_in", "time_proj.*", "blocks.4-4.ff.net.2") == {
        *(f"blocks.{i}.skip_linear" for i in (3, 4)),
        *("proj_in", "time_proj.linear_1", "time_proj.linear_2", "blocks.4.ff.net.2"),
    }
    for nothing in ("o_q", "blocks.7-9.attn1.to_q", "*.to_x", "to", "attn", "blocks.1", "ff.net"):
        with pytest.raises(ValueError, match=f"target {nothing!r} matches no linear layer".replace("*", r"\*")):
            found(nothing)


def test_ranges_are_numbers_and_whole_components():
    assert matches("blocks.10.attn1.to_q", "blocks.8-12.*") and not matches("blocks.1.attn1.to_q", "blocks.8-12.*")
    assert not matches("blocks.100.attn1.to_q", "blocks.8-12.*") and not matches("myblocks.9.x", "blocks.8-12.x")
    for wrong in ("blocks.12-8.x", "blocks.0-999999999.x"):
        with pytest.raises(ValueError, match="is no range"):
            matches("blocks.9.x", wrong)


def test_patterns_hold_for_ranks_and_alphas_too():
    config = LoRAConfig(rank=4, rank_pattern={"blocks.0-1.*": 2, "blocks.*.ff.*": 8}, alpha_pattern={"*.to_q": 1})
    ranks = [config.rank_of(p) for p in ("blocks.1.ff.net.2", "blocks.2.ff.net.2", "proj_in", "blocks.0.attn1.to_q")]
    assert ranks == [2, 8, 4, 2] and config.scale_of("blocks.0.attn1.to_q") == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_all_linears_train(midi_golden, kind):
    """Feed-forward, skips, projections: everything but the query of a one-token condition gets a gradient."""
    g, model = midi_golden, golden_dit("midi_tiny")
    lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=ALL))
    lora.freeze_base(model)
    scramble(model)
    run(model, g).square().mean().backward()
    for key, parameter in lora.adapter_parameters(model).items():
        assert (parameter.grad is None) == (".attn2.to_q." in key), key


def test_the_tree_for_peft_has_the_same_linears(midi_dit):
    config = json.loads((GOLDEN / "midi_tiny" / "checkpoint" / "transformer" / "config.json").read_text())
    plain = {n for n, m in PlainDiT(config).named_modules() if isinstance(m, torch.nn.Linear)}
    assert plain == set(dotted(midi_dit))


def test_only_the_query_of_a_single_token_has_no_gradient_in_the_reference():
    """`train` warns of exactly these: the reference's gradients there are rounding noise, all others are not."""
    gradients = load_file(GOLDEN / "midi_tiny" / "lora_grads.safetensors")
    still = {key.split(".lora_")[0] for key, value in gradients.items() if value.abs().max() < 1e-7}
    assert still == {f"blocks.{i}.attn2.to_q" for i in range(5)}

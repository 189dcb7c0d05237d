"""LoRA layers against the recorded reference and the peft package, and the promises made to the base weights."""

import pytest
import torch
from golden_files import GOLDEN, golden_dit, relative_error
from peft_pair import peft_pair
from safetensors.torch import load_file

from midilite import lora
from midilite.flow import schedule as flow
from midilite.model.layers import Linear

CONFIG = lora.LoRAConfig(rank=4, alpha=8)


def adapted_dit():
    model = golden_dit("midi_tiny")
    lora.inject(model, CONFIG)
    state = torch.load(GOLDEN / "midi_tiny" / "lora" / "lora_weights.pth", weights_only=True)
    lora.load_adapter_state(model, {key: value.float() for key, value in state.items()})
    return model


def run(model, g, groups=(2, 1, 1, 3, 1)):
    return model(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=groups)


def test_an_adapter_equals_the_reference_at_both_scales(midi_golden):
    model = adapted_dit()
    assert relative_error(run(model, midi_golden), midi_golden["lora.out"]) < 1e-5
    lora.set_adapters(model, {"default": 0.5})
    assert relative_error(run(model, midi_golden), midi_golden["lora.out_scale_half"]) < 1e-5


def test_gradients_of_every_adapter_weight_equal_the_reference(midi_golden):
    """One training step: MSE to x0 - eps. Fails too when the target's sign is flipped."""
    g, model = midi_golden, adapted_dit()
    lora.freeze_base(model)
    noised = flow.add_noise(g["train.x0"], g["train.eps"], g["mit.t"] / 1000)
    loss = (run(model, {**g, "mit.x": noised}) - flow.target(g["train.x0"], g["train.eps"])).square().mean()
    assert relative_error(loss.detach(), g["train.loss"]) < 1e-5
    loss.backward()
    expected = load_file(GOLDEN / "midi_tiny" / "lora_grads.safetensors")
    parameters = lora.adapter_parameters(model)
    assert parameters.keys() == expected.keys()
    for key, parameter in parameters.items():
        if parameter.grad is None:  # the query of a one-token condition: the reference records its rounding noise
            assert ".attn2.to_q." in key and expected[key].abs().max() < 1e-7
        else:
            assert relative_error(parameter.grad, expected[key]) < 1e-5, key
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)


def test_a_fresh_adapter_changes_nothing_bit_for_bit(midi_dit, midi_golden):
    before, keys = run(midi_dit, midi_golden), list(midi_dit.state_dict())
    lora.inject(midi_dit, lora.LoRAConfig(rank=3, dropout=0.5))
    assert torch.equal(run(midi_dit, midi_golden), before)
    assert list(midi_dit.state_dict()) == keys


def test_merged_equals_unmerged_and_removing_restores_the_bits(midi_golden):
    base = golden_dit("midi_tiny").state_dict()
    model = adapted_dit()
    unmerged = run(model, midi_golden)
    lora.remove_adapters(model)
    assert all(torch.equal(base[key], value) for key, value in model.state_dict().items())
    model = adapted_dit()
    lora.merge_adapters(model)
    assert lora.adapter_names(model) == [] and not lora.slots(model)
    assert relative_error(run(model, midi_golden), unmerged) < 1e-5
    changed = [key for key, value in model.state_dict().items() if not torch.equal(base[key], value)]
    assert len(changed) == 5 * 3 * 4  # q, k, v, out of three attentions in five blocks


def test_merging_by_hand_set_integers():
    """Small integers are exact in any type, so this can be compared with ==."""
    linear = Linear(2, 6, bias=False, parts={"to_q": 2, "to_k": 2, "to_v": 2})
    model = torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({"qkv": linear})})
    with torch.no_grad():
        linear.weight.copy_(torch.arange(12.0).reshape(6, 2))
    lora.inject(model, lora.LoRAConfig(rank=1, alpha=2, target_modules=("to_q", "to_v")))
    state = {
        "attn1.to_q.lora_A.weight": torch.tensor([[1.0, 2.0]]),
        "attn1.to_q.lora_B.weight": torch.tensor([[3.0], [4.0]]),
        "attn1.to_v.lora_A.weight": torch.tensor([[5.0, 0.0]]),
        "attn1.to_v.lora_B.weight": torch.tensor([[0.0], [1.0]]),
    }
    lora.load_adapter_state(model, state)
    expected = torch.tensor([[6.0, 13], [10, 19], [4, 5], [6, 7], [8, 9], [20, 11]])
    x = torch.tensor([[1.0, -1.0]])
    assert torch.equal(linear(x), x @ expected.T)
    lora.merge_adapters(model)
    assert torch.equal(linear.weight, expected) and torch.equal(linear(x), x @ expected.T)


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_equal_peft(rslora):
    """The same weights in peft's own layers, on a module tree with the reference's names."""
    theirs, ours = peft_pair(use_rslora=rslora)
    x = torch.randn(5, 8)
    assert relative_error(ours(x), theirs(x)) < 1e-6
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = {k.replace(".default", ""): p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    for key, parameter in lora.adapter_parameters(ours).items():
        assert relative_error(parameter.grad, gradients[f"base_model.model.{key}"]) < 1e-5


def test_several_adapters_mix_linearly_in_a_linear_layer():
    model = torch.nn.ModuleDict({"a": Linear(4, 3)})
    for name in ("one", "two"):
        lora.inject(model, lora.LoRAConfig(rank=2, target_modules=("a",)), name)
        with torch.no_grad():
            for p in lora.adapter_parameters(model, name).values():
                p.copy_(torch.randn_like(p))
    x = torch.randn(5, 4)
    lora.set_adapters(model, {})
    base = model["a"](x)
    changes = []
    for name in ("one", "two"):
        lora.set_adapters(model, {name: 1.0})
        changes.append(model["a"](x) - base)
    lora.set_adapters(model, {"one": 0.3, "two": -2.0})
    assert relative_error(model["a"](x), base + 0.3 * changes[0] - 2 * changes[1]) < 1e-6
    lora.remove_adapters(model, ["one"])
    assert lora.adapter_names(model) == ["two"]
    with pytest.raises(ValueError, match="no adapter named 'one'; present: two"):
        lora.set_adapters(model, {"one": 1.0})


def test_ranks_and_alphas_can_differ_per_module(midi_dit):
    config = lora.LoRAConfig(rank=4, alpha=4, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"blocks.1.attn1.to_q": 6})
    lora.inject(midi_dit, config)
    state = lora.adapter_state(midi_dit)
    assert state["blocks.0.attn1.to_q.lora_A.weight"].shape == (2, 64)
    assert state["blocks.0.attn2.to_q.lora_A.weight"].shape == (4, 64)
    assert config.scale_of("blocks.1.attn1.to_q") == 3 and config.scale_of("blocks.0.attn1.to_q") == 2


def test_initial_weights_follow_the_seed_and_peft_s_distribution(midi_dit):
    lora.inject(midi_dit, CONFIG, "a", seed=1)
    lora.inject(midi_dit, CONFIG, "b", seed=1)
    lora.inject(midi_dit, CONFIG, "c", seed=2)
    a, b, c = (lora.adapter_state(midi_dit, name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    downs = torch.cat([v.flatten() * v.shape[1] ** 0.5 for k, v in a.items() if "lora_A" in k])
    assert -1 <= downs.min() < -0.99 and 0.99 < downs.max() <= 1 and abs(downs.std() - 3**-0.5) < 0.02
    assert not torch.equal(a["blocks.0.attn1.to_q.lora_A.weight"], c["blocks.0.attn1.to_q.lora_A.weight"])
    assert all(not v.any() for k, v in a.items() if "lora_B" in k)


def test_dropout_acts_in_training_only(midi_golden):
    model = golden_dit("midi_tiny")
    lora.inject(model, lora.LoRAConfig(rank=4, dropout=0.5))
    with torch.no_grad():
        for key, p in lora.adapter_parameters(model).items():
            p.copy_(torch.randn_like(p) if "lora_B" in key else p)
    assert torch.equal(run(model, midi_golden), run(model, midi_golden))
    model.train()
    assert not torch.equal(run(model, midi_golden), run(model, midi_golden))


def test_wrong_uses_are_named(midi_dit):
    with pytest.raises(ValueError, match="target 'to_x' matches no linear layer; last names that exist: .*to_out.0"):
        lora.inject(midi_dit, lora.LoRAConfig(target_modules=("to_q", "to_x")))
    lora.inject(midi_dit, CONFIG)
    with pytest.raises(ValueError, match="'default' is already there"):
        lora.inject(midi_dit, CONFIG)
    state = lora.adapter_state(midi_dit)
    state["blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 32)
    state["blocks.9.attn1.to_q.lora_A.weight"] = torch.zeros(4, 64)
    del state["blocks.1.attn1.to_v.lora_B.weight"]
    with pytest.raises(ValueError) as error:
        lora.load_adapter_state(midi_dit, state)
    assert "missing blocks.1.attn1.to_v.lora_B.weight (64, 4)" in str(error.value)
    assert "unexpected blocks.9.attn1.to_q.lora_A.weight (4, 64)" in str(error.value)
    assert "blocks.0.attn1.to_q.lora_A.weight: found (4, 32), expected (4, 64)" in str(error.value)
    for wrong in ({"rank": 0}, {"rank": 1.5}, {"dropout": 1.0}, {"target_modules": ()}):
        with pytest.raises(ValueError, match="LoRA"):
            lora.LoRAConfig(**wrong)


def test_targets_match_whole_names():
    paths = ["blocks.1.attn1.to_q", "blocks.10.attn1.to_q", "blocks.1.attn1.to_q_extra"]
    assert lora.match_targets(paths, ["to_q"]) == paths[:2]
    assert lora.match_targets(paths, ["blocks.1.attn1.to_q"]) == paths[:1]

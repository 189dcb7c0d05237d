"""The transformer against the recorded reference, and the properties that multi-instance attention must have."""

import pytest
import torch
from golden_files import relative_error

from midilite.model import dit, layers
from midilite.model.config import DiTConfig, block_numbers


def test_plain_attention_equals_the_reference(midi_dit, midi_golden):
    g = midi_golden
    out = midi_dit(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])
    assert relative_error(out, g["dit.out_plain"]) < 1e-5


def test_a_guided_scene_equals_the_reference(midi_dit, midi_golden):
    g = midi_golden
    n = int(g["mi.num_instances"])
    out = midi_dit(g["mi.x"], g["mi.t"], g["mi.e1"], g["mi.e2"], groups=[n, n])
    assert relative_error(out, g["mi.out"]) < 1e-5


def test_a_padded_training_batch_equals_the_reference(midi_dit, midi_golden):
    g = midi_golden
    out = midi_dit(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=[2, 1, 1, 3, 1])
    assert relative_error(out, g["mit.out"]) < 1e-5


def test_one_condition_equals_the_reference(triposg_dit, triposg_golden):
    g = triposg_golden
    assert relative_error(triposg_dit(g["dit.x"], g["dit.t"], g["dit.e"]), g["dit.out"]) < 1e-5


def test_projected_conditions_and_the_unconditional_shortcut_equal_zero_conditions(midi_dit, midi_golden):
    g = midi_golden
    x, t, e1, e2 = g["mi.x"], g["mi.t"], g["mi.e1"][3:], g["mi.e2"][3:]
    slow = midi_dit(x, t, torch.cat([e1 * 0, e1]), torch.cat([e2 * 0, e2]), groups=[3, 3])
    fast = midi_dit(x, t, midi_dit.project_conditions(e1, e2, unconditional=3), groups=[3, 3])
    assert relative_error(fast, slow) < 1e-6
    only = midi_dit(x[:3], t[:3], midi_dit.project_conditions(e1[:0], e2[:0], unconditional=3), groups=[3])
    assert relative_error(only, slow[:3]) < 1e-6


def test_conditions_for_another_number_of_samples_are_refused(midi_dit, midi_golden):
    x, t, e1, e2 = (midi_golden[f"mi.{key}"][3:] for key in ("x", "t", "e1", "e2"))
    known = midi_dit.project_conditions(e1, e2, unconditional=3)
    with pytest.raises(ValueError, match="conditions for 3 samples and 3 samples without, the batch has 3"):
        midi_dit(x, t, known)


def test_reading_q_k_v_by_name_would_fail(midi_dit, midi_golden, monkeypatch):
    """The trap: the usual head split gives a plausible but wrong network."""
    monkeypatch.setattr(dit, "split_interleaved", layers.split_stacked)
    g = midi_golden
    out = midi_dit(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])
    assert relative_error(out, g["dit.out_plain"]) > 0.05


def test_instances_permute_with_their_inputs(midi_dit, midi_golden):
    g = midi_golden
    order = torch.tensor([2, 0, 1])
    x, t, e1, e2 = (g[f"mi.{k}"][3:] for k in ("x", "t", "e1", "e2"))
    out = midi_dit(x, t, e1, e2, groups=[3])
    permuted = midi_dit(x[order], t[order], e1[order], e2[order], groups=[3])
    assert relative_error(permuted, out[order]) < 1e-5
    assert relative_error(permuted, out) > 1e-3


def test_neighbours_matter_and_padding_does_not_leak(midi_dit, midi_golden):
    """Another instance of the scene changes the result; a padding instance (a group of its own) must not."""
    g = midi_golden
    x, t, e1, e2 = (g[f"mit.{k}"] for k in ("x", "t", "e1", "e2"))
    groups = [2, 1, 1, 3, 1]
    out = midi_dit(x, t, e1, e2, groups=groups)
    other_padding = x.clone()
    other_padding[[2, 3, 7]] += 10
    real = [0, 1, 4, 5, 6]
    assert torch.equal(midi_dit(other_padding, t, e1, e2, groups=groups)[real], out[real])
    other_neighbour = x.clone()
    other_neighbour[1] += 1
    changed = midi_dit(other_neighbour, t, e1, e2, groups=groups)
    assert relative_error(changed[0], out[0]) > 1e-4
    assert torch.equal(changed[4:], out[4:])


def test_ragged_scenes_equal_each_scene_alone(midi_dit, midi_golden):
    g = midi_golden
    x, t, e1, e2 = (g[f"mit.{k}"] for k in ("x", "t", "e1", "e2"))
    together = midi_dit(x, t, e1, e2, groups=[3, 1, 4])
    alone = [midi_dit(x[s], t[s], e1[s], e2[s], groups=[s.stop - s.start]) for s in map(slice, [0, 3, 4], [3, 4, 8])]
    assert relative_error(together, torch.cat(alone)) < 1e-5


def test_blocks_match_exactly_or_by_number():
    """`blocks.1` is not `blocks.10`: a substring match turns block 10 on as well."""
    assert block_numbers(["blocks.1"], 21) == (1,)
    assert block_numbers(["blocks.10", 3], 21) == (3, 10)
    config = DiTConfig(4, 32, 8, 21, 16, 16)
    assert dit.DiT(config, ["blocks.1"]).multi_instance_blocks == {1}
    assert dit.DiT(config).multi_instance_blocks == {8, 9, 10, 11, 12}
    for wrong in ("block.1", "blocks.1.attn1", "1x", True, "blocks.21", 21):
        with pytest.raises(ValueError, match="multi-instance block"):
            block_numbers([wrong], 21)


def test_multi_instance_blocks_change_the_result_only_where_listed(midi_dit, midi_golden):
    g = midi_golden
    arguments = (g["mi.x"], g["mi.t"], g["mi.e1"], g["mi.e2"])
    full = midi_dit(*arguments, groups=[3, 3])
    midi_dit.set_multi_instance_blocks([1])
    one = midi_dit(*arguments, groups=[3, 3])
    midi_dit.set_multi_instance_blocks([])
    none = midi_dit(*arguments, groups=[3, 3])
    assert relative_error(one, full) > 1e-4 and relative_error(one, none) > 1e-4
    assert torch.equal(none, midi_dit(*arguments))


def test_checkpointing_changes_no_gradient(midi_dit, midi_golden):
    g = midi_golden
    grads = []
    for midi_dit.gradient_checkpointing in (None, "full"):
        midi_dit.zero_grad()
        midi_dit(g["mi.x"], g["mi.t"], g["mi.e1"], g["mi.e2"], groups=[3, 3]).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in midi_dit.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_sizes_that_do_not_fit_are_named_with_both_values(midi_dit, midi_golden):
    g = midi_golden
    x, t, e1, e2 = (g[f"mi.{k}"] for k in ("x", "t", "e1", "e2"))
    with pytest.raises(ValueError, match=r"\[3, 2\] sum to 5, the batch has 6"):
        midi_dit(x, t, e1, e2, groups=[3, 2])
    with pytest.raises(ValueError, match=r"\[6, 12, 7\].*8\]"):
        midi_dit(x[..., :7], t, e1, e2)
    with pytest.raises(ValueError, match=r"widths \[24\].*\[24, 40\]"):
        midi_dit(x, t, e1)
    with pytest.raises(ValueError, match="width 65 is not a multiple of num_attention_heads 4"):
        DiTConfig(num_attention_heads=4, width=65)
    with pytest.raises(ValueError, match="num_layers 4 is even"):
        DiTConfig(num_layers=4)

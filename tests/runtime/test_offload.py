"""Offloaded blocks: the same bits as without, whatever the order in which blocks run and however late copies arrive.

The tests named after a GPU are skipped without one; on it they let the work, or the copies, lag far behind.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from adapter_kinds import KINDS, run, scramble
from golden_files import GOLDEN, golden_dit, relative_error

import midilite
from midilite import lora
from midilite.commands import train
from midilite.model.config import DiTConfig
from midilite.model.dit import DiT
from midilite.model.fingerprint import base_fingerprint
from midilite.model.layers import Linear
from midilite.runtime import offload
from midilite.runtime.offload import offload_blocks
from midilite.runtime.quantize import quantize_base
from midilite.training.memory import base_bytes, linear_weights
from midilite.training.options import TrainOptions

MIDI = GOLDEN / "midi_tiny"
SLOTS = (1, 2, 3, 9)  # the golden model has five blocks
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def trained_dit(kind="lora", quantize=None, targets=("*",)):
    """A model with an adapter that does something, checkpointed."""
    model = golden_dit("midi_tiny")
    if quantize:
        quantize_base(model, quantize)
    lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=targets))
    scramble(model)
    lora.freeze_base(model)
    model.gradient_checkpointing = "full"
    return model


def gradients(model, golden, times=1):
    """Velocities of some passes, and the gradients of their sum."""
    velocities = [run(model, golden) for _ in range(times)]
    weights = list(lora.adapter_parameters(model).values())
    loss = sum((i + 1) * v.square().mean() for i, v in enumerate(velocities))
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return [v.detach() for v in velocities] + list(found)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", SLOTS)
def test_inference_gives_the_same_bits(midi_golden, slots):
    """Conditions as tokens and projected ahead, with and without an unconditional half, over and over."""
    plain, model = golden_dit("midi_tiny"), golden_dit("midi_tiny")
    offload_blocks(model, "cpu", slots)
    g, groups = midi_golden, (2, 1, 1, 3, 1)
    with torch.inference_mode():
        for _ in range(2):
            results = []
            for m in (plain, model):
                known = m.project_conditions(g["mit.e1"], g["mit.e2"])
                half = m.project_conditions(g["mit.e1"][:4], g["mit.e2"][:4], unconditional=4)
                first = [m(g["mit.x"], g["mit.t"], c, groups=groups) for c in (known, half, known)]
                results.append([*first, run(m, g)])
            assert_equal(*results)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("slots", SLOTS)
def test_training_gives_the_same_bits(midi_golden, slots, recompute):
    """Steps, with evaluations between them that run in the other order."""
    plain, model = trained_dit(), trained_dit()
    plain.gradient_checkpointing = model.gradient_checkpointing = recompute
    offload_blocks(model, "cpu", slots)
    expected = gradients(plain, midi_golden)
    for _ in range(2):
        assert_equal(gradients(model, midi_golden), expected)
        with torch.no_grad():
            assert torch.equal(run(model, midi_golden), expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_with_every_kind_of_adapter_and_base(midi_golden, kind, quantize):
    """DoRA reads the weights in its own way, so must read them from where they are at the time."""
    plain, model = trained_dit(kind, quantize), trained_dit(kind, quantize)
    offload_blocks(model, "cpu")
    assert_equal(gradients(model, midi_golden), gradients(plain, midi_golden))


def test_several_passes_before_their_backward_pass(midi_golden):
    """Their backward passes come one after the other, the last pass first; twice, as the graph is kept."""
    plain, model = trained_dit(), trained_dit()
    offload_blocks(model, "cpu")
    assert_equal(gradients(model, midi_golden, times=3), gradients(plain, midi_golden, times=3))


def test_adapters_may_come_later_and_nothing_changes_the_base(midi_golden):
    plain, model = trained_dit("pissa"), golden_dit("midi_tiny")
    fingerprint = base_fingerprint(model)
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    offload_blocks(model, "cpu")
    lora.inject(model, dataclasses.replace(KINDS["pissa"], target_modules=("*",)))
    scramble(model)
    lora.freeze_base(model)
    model.gradient_checkpointing = "full"
    assert_equal(gradients(model, midi_golden), gradients(plain, midi_golden))
    assert base_fingerprint(model) == fingerprint
    state = model.state_dict()
    assert state.keys() == bits.keys() and all(torch.equal(state[key], bits[key]) for key in bits)


# --- how it is done ---------------------------------------------------------------------------------------------------


def test_every_product_reads_a_slot(midi_golden):
    """On a CPU a block that nobody entered would still find its weights; on a GPU it would not."""
    model = trained_dit(targets=("to_q", "to_k", "to_v", "to_out.0"))
    offload_blocks(model, "cpu")
    state, seen = model.placement.offload, []
    places = {t.data_ptr() for slot in state.slots for t in slot.tensors.values()}
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda m, _: seen.append(m.weight.data_ptr() in places))
    gradients(model, midi_golden)
    with torch.no_grad():
        model.project_conditions(midi_golden["mit.e1"], midi_golden["mit.e2"])
    assert len(seen) > 3 * len(model.blocks) and all(seen)
    assert state.bytes_on_device() == 2 * 4 * max(linear_weights(model.config))


def test_copies_that_arrive_at_the_last_moment(midi_golden, monkeypatch):
    """A stream that does nothing until it is waited for: whoever forgets to wait computes with another block."""

    class Lazy(offload._Copies):
        def start(self, slot, source):
            self.wait_for(slot)  # a stream keeps its order
            slot.loaded = source

        def wait_for(self, slot):
            source, slot.loaded = slot.loaded, None
            if source is not None:
                super().start(slot, source)

    plain, model = trained_dit(), trained_dit()
    monkeypatch.setattr(offload, "_Copies", Lazy)
    offload_blocks(model, "cpu", slots=3)
    for _ in range(2):
        assert_equal(gradients(model, midi_golden), gradients(plain, midi_golden))
    with torch.no_grad():
        assert torch.equal(run(model, midi_golden), run(plain, midi_golden))


@pytest.mark.parametrize("slots", [2, 3])
def test_blocks_are_under_way_before_they_are_needed(midi_golden, slots):
    """In the steady state nothing is waited for from the start, and nothing is copied twice: L copies per pass without
    gradients, with them 2 (L - slots), because the blocks at both turning points are there already."""
    model, log = trained_dit(), []
    offload_blocks(model, "cpu", slots)
    state = model.placement.offload
    load, enter = state._load, state.enter

    def logged_load(i, slot):
        log.append(("load", i))
        return load(i, slot)

    def logged_enter(i):
        log.append(("enter", i, state._slot_of(i) is not None))
        enter(i)

    state._load, state.enter = logged_load, logged_enter
    blocks = len(model.blocks)
    for grad, copies, entries in ((True, 2 * (blocks - slots), 2 * blocks), (False, blocks, blocks)):
        with torch.set_grad_enabled(grad):
            for turn in range(3):
                log.clear()
                gradients(model, midi_golden) if grad else run(model, midi_golden)
                if turn:
                    assert sum(entry[0] == "load" for entry in log) == copies
                    entered = [entry for entry in log if entry[0] == "enter"]
                    assert len(entered) == entries and all(ready for *_, ready in entered)


# --- what can't be done -----------------------------------------------------------------------------------------------


def test_training_without_checkpointing_is_refused(midi_golden):
    model = trained_dit()
    offload_blocks(model, "cpu")
    model.gradient_checkpointing = False
    with pytest.raises(ValueError, match="trained with gradient checkpointing only"):
        run(model, midi_golden)
    lora.remove_adapters(model)
    run(model, midi_golden)  # frozen: nothing is kept
    g = midi_golden
    with pytest.raises(ValueError, match="trained with gradient checkpointing only"):
        model(g["mit.x"].requires_grad_(), g["mit.t"], g["mit.e1"], g["mit.e2"])
    g["mit.x"].requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient to conditions"):
        model.project_conditions(g["mit.e1"], g["mit.e2"].clone().requires_grad_())


def test_what_does_not_go_together_is_named(midi_golden):
    model = trained_dit()
    with pytest.raises(ValueError, match="slots is 0"):
        offload_blocks(model, "cpu", 0)
    offload_blocks(model, "cpu")
    with pytest.raises(ValueError, match="offloaded already"):
        offload_blocks(model, "cpu")
    with pytest.raises(ValueError, match="quantise the base first"):
        quantize_base(model, "int8")
    with pytest.raises(ValueError, match="the base is offloaded, so nothing can be merged into it"):
        lora.merge_adapters(model)
    assert lora.adapter_names(model) == ["default"]


# --- in the commands --------------------------------------------------------------------------------------------------


def test_a_pipeline_gives_the_same_latents():
    images = MIDI / "scene_rgb.png", MIDI / "scene_seg.png"
    latents = []
    for settings in ({}, {"offload_blocks": True}):
        pipe = midilite.load_pipeline(MIDI / "checkpoint", "cpu", **settings)
        pipe.load_adapter(MIDI / "lora" / "lora_weights.pth", lora_alpha=8.0)
        conditions = pipe.encode_images(*images)
        latents.append(pipe.sample(conditions, 2, 3.0, num_tokens=16))
    assert torch.equal(*latents)


def test_the_inference_command_takes_both_flags(tmp_path):
    """Offloading changes no byte of the scene; eight bits do, and offloading them again nothing."""
    from test_infer import golden_run  # needs trimesh, and the tests on a GPU shall not

    flags = ([], ["--offload_blocks"], ["--quantize_base", "int8"], ["--quantize_base", "int8", "--offload_blocks"])
    scenes = []
    for i, more in enumerate(flags):
        assert golden_run(tmp_path / f"{i}.ply", "--no-preview", *more) == 0
        scenes.append((tmp_path / f"{i}.ply").read_bytes())
    assert scenes[0] == scenes[1] and scenes[2] == scenes[3] and scenes[0] != scenes[2]


RUNS = {
    "offload": ({"offload_blocks": True}, {}),
    "int8": ({"quantize_base": "int8", "mixed_precision": "bf16", "ema_decay": 0.9}, None),
    "int8 offload": ({"quantize_base": "int8", "offload_blocks": True}, {"quantize_base": "int8"}),
    "fp8": ({"quantize_base": "fp8", "lora_dropout": 0.1}, None),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_runs_resume_and_write_the_same_bytes(prepared, quick_model, tmp_path, name):
    """With validation, generated scenes and previews, against the same run in the other form of the base (where that
    changes no bit), and stopped in the middle and resumed."""
    changes, same = RUNS[name]
    options = TrainOptions(
        pretrained_model=quick_model, data_dir=str(prepared), cache_dir=str(prepared.parent / "cache"),
        output_dir=str(tmp_path / "whole"), device="cpu", num_tokens=16, lora_rank=4, learning_rate=1e-3,
        batch_size=1, gradient_checkpointing=True, checkpointing_steps=2, save_every_n_epochs=0, max_train_steps=4,
        val_fraction=0.3, validate_every=2, eval_every=2, preview_every=2, eval_scenes=1,
    )  # fmt: skip

    def adapter(folder, **more):
        own = dataclasses.replace(options, output_dir=str(tmp_path / folder), **more)
        return (train.train_lora(own) / "adapter_model.safetensors").read_bytes()

    whole = adapter("whole", **changes)
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert all(line["loss"] is not None for line in lines) and lines[1]["val_loss"] is not None
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    assert adapter("part", resume_from_checkpoint="latest", **changes) == whole
    quiet = {"validate_every": 0, "eval_every": 0, "preview_every": 0}  # watching changes nothing
    if same is not None:
        assert adapter("same", **same, **quiet) == whole
    if "quantize_base" in changes:
        with pytest.raises(ValueError, match="quantize_base: .* -> none"):
            adapter("part", resume_from_checkpoint="latest", **{**changes, "quantize_base": "none"})


def test_memory_estimates_know_both():
    """The published size: blocks hold 97% of the weights; two of 21 blocks are on the GPU."""
    config = DiTConfig(
        num_attention_heads=16, width=2048, in_channels=64, num_layers=21, cross_attention_dim=768,
        cross_attention_2_dim=1024,
    )  # fmt: skip
    weights, base = linear_weights(config), 1_682_000_000
    assert len(weights) == 21 and 0.96 < sum(weights) / base < 0.99 and max(weights) == weights[-1]
    options = TrainOptions(mixed_precision="bf16", gradient_checkpointing=True)
    plain, eight, visiting, both = (
        base_bytes(dataclasses.replace(options, **changes), config, base)
        for changes in (
            {}, {"quantize_base": "int8"}, {"offload_blocks": True}, {"quantize_base": "int8", "offload_blocks": True},
        )
    )  # fmt: skip
    assert plain == 2 * base and plain - eight == sum(weights) and plain - visiting == 2 * sum(weights[:-2])
    assert visiting - both == 2 * max(weights)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu_pair(dtype=torch.bfloat16, quantize=None):
    """Two equal models, the second one offloaded; large enough that a GPU falls behind what it is given."""
    config = DiTConfig(
        num_attention_heads=8, width=1024, in_channels=64, num_layers=9, cross_attention_dim=256,
        cross_attention_2_dim=512,
    )  # fmt: skip
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DiT(config, multi_instance_blocks=(3, 4, 5)).to(dtype).requires_grad_(False)
        if quantize:
            quantize_base(model, quantize)
        lora.inject(model, lora.LoRAConfig(rank=4))
        scramble(model)
        lora.freeze_base(model)
        model.gradient_checkpointing = "full"
        pair.append(model)
    pair[0].cuda()
    offload_blocks(pair[1], "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (3, 512, 64), (3, 1, 256), (3, 257, 512)
    x, *conditions = (torch.randn(size, generator=generator, device="cuda") for size in sizes)
    return pair, (x, torch.full((1,), 500.0, device="cuda"), *conditions)


@on_gpu
@pytest.mark.parametrize("late", ["work", "copies", "nothing"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_on_a_gpu_whatever_lags_behind(monkeypatch, late, quantize):
    """Forward passes give the same bits; gradients differ by what attention's kernels add up in any order. A block that
    computed with another's weights would be off by everything."""
    (plain, model), inputs = gpu_pair(quantize=quantize)
    if late == "work":
        for block in model.blocks:
            block.norm1.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))
    if late == "copies":
        start = offload._Copies.start

        def slow(self, slot, source):
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(20_000_000)
            start(self, slot, source)

        monkeypatch.setattr(offload._Copies, "start", slow)
    with torch.inference_mode():
        results = []
        for m in (plain, model):
            known = m.project_conditions(*inputs[2:])
            results.append([m(*inputs[:2], known, groups=[2, 1]) for _ in range(3)])
        assert_equal(*results)

    def loss(m):
        return m(*inputs, groups=[2, 1]).float().square().mean()

    for _ in range(2):
        found, expected = (torch.autograd.grad(loss(m), lora.freeze_base(m), allow_unused=True) for m in (model, plain))
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_error(a, b) < 0.02


@on_gpu
def test_on_a_gpu_weights_rest_in_pinned_memory_and_graphs_are_refused():
    (_, model), inputs = gpu_pair()
    state = model.placement.offload
    assert all(tensor.is_pinned() for table in state.host for tensor in table.values())
    assert all(not p.is_cuda for block in model.blocks for p in (block.ff.net["2"].weight, block.attn1.qkv.weight))
    assert all(p.is_cuda for p in lora.adapter_parameters(model).values())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        model(*inputs)
        with pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(graph):
            model(*inputs)

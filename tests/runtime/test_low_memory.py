"""Inference for small GPUs: the same result, parts in host memory while they don't work, and how much memory is needed.

Memory is counted without a GPU: the published model runs on torch's meta device, where tensors have sizes and no
contents, and every storage that lives at the same time is added up. Attention itself is replaced by its result's size.
"""

import contextlib
import weakref

import pytest
import torch
from golden_files import GOLDEN, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import midilite
from midilite import lora
from midilite.inference import decoding
from midilite.inference.sampling import guided_velocity
from midilite.model import dit, vae
from midilite.model.config import CLIPVisionConfig, DINOv2Config, DiTConfig, Sampling, VAEConfig
from midilite.model.dit import DiT
from midilite.model.encoders import CLIPVision, DINOv2
from midilite.model.layers import Linear, gelu_
from midilite.model.vae import VAE
from midilite.runtime import offload
from midilite.runtime.offload import offload_network, onload
from midilite.runtime.quantize import QuantizedLinear

MIDI = GOLDEN / "midi_tiny"
PICTURES = (MIDI / "scene_rgb.png", MIDI / "scene_seg.png")
GIB = 2**30
KINDS = {"as ever": (True, False), "halves": (True, True), "low memory": (False, True)}  # project_ahead, split_guidance


class Living(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live; `peak` is the most at a time, in bytes."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage(), given)
        return result

    def note(self, storage, given):
        key = storage._cdata
        if key in self.sizes or key in given:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def published(kind, config):
    """A network of the published size without contents, in bf16."""
    with torch.device("meta"):
        return kind(config).to(torch.bfloat16).requires_grad_(False)


def in_eight_bits(transformer):
    """As quantize.quantize_base leaves it; that one reads contents."""
    for parent in list(transformer.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                setattr(parent, name, QuantizedLinear(child, "int8", torch.device("meta")))


def weights(network):
    return sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def attention_of_no_contents(monkeypatch):
    for module in (dit, vae):
        monkeypatch.setattr(module, "attention", lambda q, k, v: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]))


def peak_of_a_step(transformer, instances, kind):
    """GiB that a guided step needs at most besides the weights, and what conditions hold between steps."""
    project_ahead, split = KINDS[kind]
    with torch.device("meta"), torch.inference_mode(), Living() as living:
        conditions = [torch.randn(instances, 1, 768).bfloat16(), torch.randn(instances, 1370, 1024).bfloat16()]
        x, t = torch.randn(instances, 2048, 64), torch.ones(1)
        model_fn = guided_velocity(transformer, conditions, x, Sampling(), True, project_ahead, split)
        held = living.now
        model_fn(x, t)
    return living.peak / GIB, held / GIB


@pytest.fixture
def pipe():
    return midilite.load_pipeline(MIDI / "checkpoint", "cpu")


def parts(pipe):
    return [pipe.clip, pipe.dinov2, pipe.vae]


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multi_instance", [True, False])
def test_a_guided_velocity_is_the_same_by_halves(midi_golden, midi_dit, kind, multi_instance):
    """1e-6: products of fewer rows may add up in another order."""
    conditions = [midi_golden["enc.embeds_1"], midi_golden["enc.embeds_2"]]
    x, t = midi_golden["pipe.latents0"], torch.tensor([400.0])
    project_ahead, split = KINDS[kind]
    with torch.inference_mode():
        expected = guided_velocity(midi_dit, conditions, x, Sampling(), multi_instance)(x, t)
        found = guided_velocity(midi_dit, conditions, x, Sampling(), multi_instance, project_ahead, split)(x, t)
    assert relative_error(found, expected) < 1e-6


def test_without_guidance_nothing_is_split(midi_golden, midi_dit):
    conditions = [midi_golden["enc.embeds_1"], midi_golden["enc.embeds_2"]]
    x, t = midi_golden["pipe.latents0"], torch.tensor([400.0])
    with torch.inference_mode():
        plain = guided_velocity(midi_dit, conditions, x, Sampling(guidance_scale=1.0))(x, t)
        assert torch.equal(
            guided_velocity(midi_dit, conditions, x, Sampling(guidance_scale=1.0), split_guidance=True)(x, t), plain
        )


def test_gelu_in_place_gives_the_same_bits_and_keeps_what_gradients_need():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, before = torch.nn.functional.gelu(x), x.detach().clone()
    assert torch.equal(gelu_(x), expected) and torch.equal(x, before)
    with torch.no_grad():
        y = x.detach().clone()
        assert gelu_(y) is y and torch.equal(y, expected)


def test_a_pipeline_of_offloaded_parts_gives_the_recorded_scene(pipe, midi_golden, monkeypatch):
    """Copies stand for what is on the GPU: every part works with its own only while it works."""
    monkeypatch.setattr(offload, "_copied", lambda contents, device: contents.clone())
    expected = pipe(*PICTURES, num_inference_steps=2, num_tokens=8, grid_depth=4)
    pipe.offload_parts()
    kept, seen = [next(part.parameters()).data_ptr() for part in parts(pipe)], []
    for part, place in zip(parts(pipe), kept, strict=True):
        offload_network(part, "meta")
        watched = part.decoder if part is pipe.vae else part
        method = "query" if part is pipe.vae else "forward"
        plain = getattr(watched, method)

        def spy(*args, part=part, place=place, plain=plain):
            others = [p for p in parts(pipe) if p is not part]
            waits = all(next(p.parameters()).data_ptr() in kept for p in others)
            seen.append((type(part), waits and next(part.parameters()).data_ptr() != place))
            return plain(*args)

        monkeypatch.setattr(watched, method, spy)
    found = pipe(*PICTURES, num_inference_steps=2, num_tokens=8, grid_depth=4)
    assert {kind for kind, _ in seen} == {CLIPVision, DINOv2, VAE} and all(right for _, right in seen)
    assert [next(part.parameters()).data_ptr() for part in parts(pipe)] == kept
    assert relative_error(found.latents, expected.latents) < 1e-5
    latents = pipe.sample(found.conditions, 6, 7.0, latents=midi_golden["pipe.latents0"])
    assert relative_error(latents, midi_golden["pipe.latents6"]) < 1e-4


# --- where a part is --------------------------------------------------------------------------------------------------


def test_an_offloaded_network_visits_with_its_adapters_and_returns_after_an_error(pipe, monkeypatch):
    """Adapters that came later and PiSSA's start, which is a buffer, too; all bits are back."""
    encoder, asked = pipe.dinov2, []
    monkeypatch.setattr(offload, "_copied", lambda contents, device: asked.append(device) or contents.clone())
    offload_network(encoder, "meta")
    lora.inject(encoder, lora.LoRAConfig(rank=2, init="pissa", target_modules=("*",)))
    before = {name: (t, t.data_ptr(), t.clone()) for name, t in (*encoder.named_parameters(), *encoder.named_buffers())}
    assert any("start_A" in name for name in before) and any(".A." in name for name in before)
    with contextlib.suppress(KeyError), torch.inference_mode(), onload(encoder):
        assert all(tensor.data_ptr() != place and not tensor.is_inference() for tensor, place, _ in before.values())
        next(encoder.parameters()).zero_()
        raise KeyError
    assert asked == [torch.device("meta")] * len(before)
    for tensor, place, bits in before.values():
        assert tensor.data_ptr() == place and torch.equal(tensor, bits) and not tensor.is_inference()


def test_on_a_cpu_nothing_moves(monkeypatch):
    """Whether asked for when loading or afterwards; and a network that is not offloaded is left alone."""
    monkeypatch.setattr(offload, "_copied", lambda contents, device: pytest.fail("moved"))
    pipe = midilite.load_pipeline(MIDI / "checkpoint", "cpu", offload_parts=True)
    assert pipe.low_memory and all(part.placement.compute_device == torch.device("cpu") for part in parts(pipe))
    pipe.encode_images(*PICTURES)
    with onload(midilite.load_pipeline(MIDI / "checkpoint", "cpu").vae):
        pass


# --- how much ---------------------------------------------------------------------------------------------------------


def test_the_counter_counts():
    """Two buffers at a time, then views and what is written in place add nothing."""
    with Living() as living:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b[10:].view(2, -1).add_(1)
        del b
        assert living.now == 4000 and living.peak == 8000
        del c
    assert living.now == 0


def test_a_scene_of_four_fits_small_gpus(monkeypatch):
    """Published size, bf16, GiB of tensors. On an H100 the transformer with everything held was measured at 6.5 GiB,
    and this counter said 6.3 of the same code, so a tenth is added here; what is left of a limit is for fragments.
    """
    attention_of_no_contents(monkeypatch)
    transformer, shapes = published(DiT, DiTConfig()), published(VAE, VAEConfig())
    clip = CLIPVisionConfig(1024, 4096, 768, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    encoders = [published(CLIPVision, clip), published(DINOv2, DINOv2Config(num_channels=7))]
    base, rest_of_it = weights(transformer) / GIB, sum(map(weights, [*encoders, shapes])) / GIB
    assert 3.0 < base < 3.2 and 1.5 < rest_of_it < 1.7
    step, held = {}, {}
    for kind in KINDS:
        step[kind], held[kind] = peak_of_a_step(transformer, 4, kind)
    assert 0.87 < held["as ever"] < 0.9, "keys and values of all blocks, and not the products that they are views of"
    assert step["as ever"] < 2.3 and step["low memory"] < 0.7 and held["low memory"] < 0.02
    assert 1.1 * (base + step["low memory"]) < 5.5, "no need to quantise for 6 GB"
    seven, _ = peak_of_a_step(transformer, 7, "low memory")
    assert 1.1 * (base + seven) < 5.5
    in_eight_bits(transformer)
    quantized, _ = peak_of_a_step(transformer, 4, "low memory")
    assert weights(transformer) / GIB < 1.65 and 1.1 * (weights(transformer) / GIB + quantized) < 3.5
    with torch.device("meta"), torch.inference_mode(), Living() as living:
        shapes.field(torch.randn(2048, 64))(torch.rand(decoding._FEW_POINTS, 3))
    grids = 8 * 4 * 257**3  # values, bounds, indices ...: a few of them at a time
    assert 1.1 * (base + (weights(shapes) + living.peak + grids) / GIB) < 5.5

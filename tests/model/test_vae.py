"""The shape VAE against the recorded reference, and farthest point sampling against its definition."""

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from golden_files import golden_vae, relative_error

from midilite.common.seeds import torch_generator
from midilite.model import layers, vae
from midilite.model.config import VAEConfig


def test_encoder_equals_the_reference(midi_vae, midi_golden):
    g = midi_golden
    mean, logvar = midi_vae.encode(g["vae.surface"], int(g["vae.num_tokens"]), subset=g["vae.random_subset"])
    assert relative_error(mean, g["vae.mean"]) < 1e-5
    assert relative_error(logvar, g["vae.logvar"]) < 1e-5


def test_query_points_equal_the_reference(midi_golden):
    g = midi_golden
    subset = torch.from_numpy(np.random.default_rng(7).choice(600, 256, replace=False))
    assert torch.equal(subset, g["vae.random_subset"])
    assert torch.equal(vae.sample_queries(g["vae.surface"], subset, 64), g["vae.sampled_queries"])


@pytest.mark.parametrize("kind", ["midi_tiny", "triposg_tiny"])
def test_decoder_equals_the_reference(kind, request):
    g = request.getfixturevalue("midi_golden" if kind == "midi_tiny" else "triposg_golden")
    model = golden_vae(kind)
    assert relative_error(model.decode(g["vae.z"], g["vae.q"]), g["vae.sdf"]) < 1e-5
    field = model.field(g["vae.z"][1])
    assert relative_error(field(g["vae.q"][1]), g["vae.sdf"][1, :, 0]) < 1e-5


def test_the_usual_head_split_would_fail(midi_vae, midi_golden, monkeypatch):
    monkeypatch.setattr(vae, "split_interleaved", layers.split_stacked)
    g = midi_golden
    assert relative_error(midi_vae.decode(g["vae.z"], g["vae.q"]), g["vae.sdf"]) > 0.01


def test_farthest_point_sampling_follows_its_definition():
    """Against a direct O(N T) search in float64 on random clouds, batched."""
    points = torch.rand(3, 200, 3, generator=torch_generator("fps"))
    found = vae.farthest_point_sampling(points, 40)
    for cloud, indices in zip(points.double(), found.tolist(), strict=True):
        expected = [0]
        while len(expected) < 40:
            expected.append(int(torch.cdist(cloud, cloud[expected]).min(dim=1).values.argmax()))
        assert indices == expected
    with pytest.raises(ValueError, match="sampling of 201 points .* found 200"):
        vae.farthest_point_sampling(points, 201)


def test_encoding_needs_a_generator_and_repeats_with_it(midi_vae, midi_golden):
    surface = midi_golden["vae.surface"]
    first = midi_vae.encode(surface, 16, torch_generator("a"))[0]
    assert torch.equal(first, midi_vae.encode(surface, 16, torch_generator("a"))[0])
    assert not torch.equal(first, midi_vae.encode(surface, 16, torch_generator("b"))[0])
    with pytest.raises(ValueError, match="pass a torch.Generator"):
        midi_vae.encode(surface, 16)
    with pytest.raises(ValueError, match=r"\[2, 600, 3\], expected \[objects, points, 6\]"):
        midi_vae.encode(surface[..., :3], 16, torch_generator("a"))


def test_logvar_is_clamped(midi_golden):
    model = golden_vae("midi_tiny")
    with torch.no_grad():
        model.quant.bias[8:] = 100.0
        logvar = model.encode(midi_golden["vae.surface"], 16, torch_generator(0))[1]
    assert logvar.max() == 20.0


def test_latents_are_drawn_with_the_encoders_spread():
    mean, logvar = torch.full((50_000,), 2.0), torch.full((50_000,), np.log(0.25))
    draws = vae.sample_latents(mean, logvar, torch_generator("draw"))
    assert abs(draws.mean() - 2) < 0.01 and abs(draws.std() - 0.5) < 0.01


def test_embedding_keeps_precision_in_half_precision_models():
    """Neighbours on a 257^3 grid must stay apart whatever the type of the weights (they are equal in bf16)."""
    points = torch.tensor([[[0.5, 0.5, 0.5], [0.5 + 2 / 256 / 4, 0.5, 0.5]]], dtype=torch.float32)
    embedded = vae.embed_points(points, 8)
    assert embedded.dtype == torch.float32 and (embedded[0, 0] - embedded[0, 1]).abs().max() > 0.1


def test_config_errors_name_both_sizes():
    with pytest.raises(ValueError, match="width_decoder 50 is not a multiple of num_attention_heads 4"):
        VAEConfig.from_dict({"width_decoder": 50, "num_attention_heads": 4, "width_encoder": 32}, "x.json")
    with pytest.raises(ValueError, match="x.json: embed_include_pi is True"):
        VAEConfig.from_dict({"embed_include_pi": True}, "x.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filling_up_the_embedding_changes_nothing(dtype):
    """Half-precision products are filled up with zeros, to a multiple of 8; all the same for 51 inputs and for 8."""
    for width in (51, 54, 8):
        linear = vae.PointLinear(width, 16).to(dtype)
        x = torch.randn(5, width, generator=torch_generator("fill", width)).to(dtype)
        expected = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
        torch.testing.assert_close(linear(x).float(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
        assert torch.nn.Sequential(linear).state_dict().keys() == {"0.weight", "0.bias"}

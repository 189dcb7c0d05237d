"""The whole path from an image and a mask to latents and meshes, against the recorded reference pipelines."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, relative_error
from PIL import Image

import midilite
from midilite.inference import pipeline
from midilite.mesh.isosurface import NoSurfaceError
from midilite.model.config import Sampling
from midilite.model.layers import Placement
from midilite.model.pictures import opaque

MIDI = GOLDEN / "midi_tiny"
TRIPOSG = GOLDEN / "triposg_tiny"


@pytest.fixture(scope="module")
def midi():
    blocks = json.loads((MIDI / "golden.json").read_text())["multi_instance_blocks"]
    return midilite.load_pipeline(MIDI / "checkpoint", device="cpu", multi_instance_blocks=blocks)


@pytest.fixture(scope="module")
def conditions(midi):
    return midi.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png")


def test_image_conditions_equal_the_reference(conditions, midi_golden):
    assert relative_error(conditions.clip, midi_golden["enc.embeds_1"]) < 1e-5
    assert relative_error(conditions.dinov2, midi_golden["enc.embeds_2"]) < 1e-5
    assert len(conditions.labels) == 3


def test_six_guided_steps_equal_the_reference(midi, conditions, midi_golden):
    noise = midi_golden["pipe.latents0"]
    latents = midi.sample(conditions, 6, 7.0, latents=noise)
    assert relative_error(latents, midi_golden["pipe.latents6"]) < 1e-4


def test_four_steps_without_guidance_equal_the_reference(midi, conditions, midi_golden):
    latents = midi.sample(conditions, 4, 1.0, latents=midi_golden["pipe.latents0"])
    assert relative_error(latents, midi_golden["pipe.latents4_noguidance"]) < 1e-4


def test_the_decoded_grid_equals_the_reference(midi, midi_golden):
    axis = torch.linspace(-1.005, 1.005, 17)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(1, -1, 3)
    sdf = midi.vae.decode(midi_golden["pipe.latents6"], points.expand(3, -1, -1))
    assert relative_error(sdf.reshape(3, 17, 17, 17), midi_golden["pipe.grid4"]) < 1e-4


def test_triposg_needs_no_mask_and_equals_the_reference(triposg_golden):
    pipe = midilite.load_pipeline(TRIPOSG / "checkpoint", device="cpu")
    conditions = pipe.encode_images(TRIPOSG / "object_rgb.png")
    assert conditions.clip is None and relative_error(conditions.dinov2, triposg_golden["enc.embeds"]) < 1e-5
    latents = pipe.sample(conditions, 6, 7.0, latents=triposg_golden["pipe.latents0"])
    assert relative_error(latents, triposg_golden["pipe.latents6"]) < 1e-4
    assert pipe.default_num_tokens == 2048


def test_triposg_sees_the_marked_object_alone_wherever_it_stands():
    """As the reference's script prepares it; the surface is taken on a finer grid than MIDI's by default."""
    pipe = midilite.load_pipeline(TRIPOSG / "checkpoint", device="cpu")
    thing = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    seen = []
    for size, (top, left), around in ((64, (4, 3), 0), (80, (50, 40), 255)):
        rgb, mask = np.full((size, size, 3), around, np.uint8), np.zeros((size, size), np.uint8)
        rgb[top : top + 20, left : left + 30], mask[top : top + 20, left : left + 30] = thing, 1
        seen.append(pipe.encode_images(rgb, mask).dinov2)
    assert torch.equal(*seen)
    assert pipe.sampling.grid_depth == 9
    assert midilite.load_pipeline(MIDI / "checkpoint", device="cpu").sampling.grid_depth == 8


def test_triposg_sees_the_opaque_part_of_a_cut_out_picture_alone():
    """As with a mask of it; transparency that is everywhere or nowhere marks nothing."""
    pipe = midilite.load_pipeline(TRIPOSG / "checkpoint", device="cpu")
    thing = np.random.default_rng(0).integers(0, 256, (64, 64, 4)).astype(np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[4:24, 3:33] = 1
    thing[..., 3] = 255 * mask
    thing[10, 10, 3] = 128  # at an edge: half white
    shown = np.asarray(Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.fromarray(thing)))
    expected = pipe.encode_images(shown[..., :3], mask).dinov2
    assert torch.equal(pipe.encode_images(thing).dinov2, expected)
    assert not torch.equal(pipe.encode_images(shown[..., :3]).dinov2, expected)
    for alpha in (0, 255):
        thing[..., 3] = alpha
        assert opaque(thing) is None


def test_all_three_adapter_files_give_the_recorded_output(midi, midi_golden):
    g = midi_golden
    for name in ("lora_weights.pth", "peft_state_dict.safetensors", "pytorch_lora_weights.safetensors"):
        midi.load_adapter(MIDI / "lora" / name, lora_alpha=8)
        run = lambda: midi.transformer(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=[2, 1, 1, 3, 1])  # noqa: E731
        assert relative_error(run(), g["lora.out"]) < 1e-5, name
        midi.set_adapters({"default": 0.5})
        assert relative_error(run(), g["lora.out_scale_half"]) < 1e-5, name
        midi.unload_adapters()


def test_a_seed_repeats_and_another_differs(midi, conditions):
    first, again, other = (midi.sample(conditions, 2, 2.0, seed=seed, num_tokens=8) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_progress_is_reported(midi, conditions):
    seen = []
    midi.sample(conditions, 3, 1.0, num_tokens=4, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


class SphereVAE:
    """Decodes every instance as a sphere, but one that has no surface; for what follows decoding."""

    placement = Placement()

    def __init__(self, empty: int) -> None:
        self.calls, self.empty = -1, empty

    def field(self, latents):
        self.calls += 1
        radius = -1.0 if self.calls == self.empty else 0.3 + 0.1 * self.calls
        return lambda points: points.norm(dim=-1) - radius


def test_an_instance_without_surface_is_named_and_left_out(midi, monkeypatch, tmp_path):
    monkeypatch.setattr(midi, "vae", SphereVAE(empty=1))
    rgb, seg = MIDI / "scene_rgb.png", MIDI / "scene_seg.png"
    labels = midi.encode_images(rgb, seg).labels
    with pytest.warns(pipeline.NoSurfaceWarning, match=f"instance {labels[1]} has no surface"):
        result = midi(rgb, seg, num_inference_steps=1, num_tokens=4, grid_depth=5)
    assert list(result.scene.geometry) == [f"instance_{labels[0]}", f"instance_{labels[2]}"]
    assert result.meshes[1] is None and result.latents.shape == (3, 4, 8)
    radii = [np.linalg.norm(mesh.vertices, axis=1) for mesh in result.scene.geometry.values()]
    assert abs(radii[0] - 0.3).max() < 0.005 and abs(radii[1] - 0.5).max() < 0.005  # the scale is right
    colors = {tuple(m.visual.material.baseColorFactor) for m in result.scene.geometry.values()}
    assert len(colors) == 2
    with pytest.raises(ValueError, match="no instance has a surface"), pytest.warns(pipeline.NoSurfaceWarning):
        monkeypatch.setattr(midi, "vae", SphereVAE(empty=0))
        midi.decode_meshes(torch.zeros(1, 4, 8), [5])


def test_a_nan_field_is_no_missing_surface(midi, monkeypatch):
    """NaN must not be mistaken for 'no surface': it is a broken model and says so."""

    class Broken:
        placement = Placement()

        def field(self, latents):
            return lambda points: points.sum(-1) * float("nan")

    monkeypatch.setattr(midi, "vae", Broken())
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        midi.decode_meshes(torch.zeros(1, 4, 8), [1], grid_depth=4)
    assert not isinstance(error.value, NoSurfaceError)


def test_masks_are_needed_and_must_fit(midi, tmp_path):
    with pytest.raises(ValueError, match="pass a mask"):
        midi.encode_images(MIDI / "scene_rgb.png")
    Image.fromarray(np.ones((10, 20), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="20 x 10 pixels .* image is 160 x 120"):
        midi.encode_images(MIDI / "scene_rgb.png", tmp_path / "small.png")
    Image.fromarray(np.zeros((120, 160), np.uint8)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="empty.png.*no label"):
        midi.encode_images(MIDI / "scene_rgb.png", tmp_path / "empty.png")
    many = (np.arange(120 * 160).reshape(120, 160) % 300).astype(np.uint16)
    Image.fromarray(many).save(tmp_path / "many.png")
    with pytest.raises(ValueError, match="299"):
        midi.encode_images(MIDI / "scene_rgb.png", tmp_path / "many.png")


def test_padding_encodes_a_larger_square(midi):
    plain = midi.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png")
    padded = midi.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png", padding=True)
    assert padded.image.width == padded.image.height >= max(plain.image.size)
    assert relative_error(padded.dinov2, plain.dinov2) > 1e-3


def test_merging_then_saving_keeps_the_adapted_output(midi, midi_golden, tmp_path):
    g = midi_golden
    blocks = sorted(midi.transformer.multi_instance_blocks)
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device="cpu", multi_instance_blocks=blocks)
    pipe.load_adapter(MIDI / "lora" / "lora_weights.pth", lora_alpha=8)
    with pytest.raises(ValueError, match="call merge_adapters"):
        pipe.save(tmp_path)
    pipe.merge_adapters()
    pipe.save(tmp_path / "merged")
    again = midilite.load_pipeline(tmp_path / "merged", device="cpu")
    out = again.transformer(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=[2, 1, 1, 3, 1])
    assert relative_error(out, g["lora.out"]) < 1e-5


def test_half_precision_runs_and_stays_near(midi, midi_golden):
    blocks = sorted(midi.transformer.multi_instance_blocks)
    pipe = midilite.load_pipeline(MIDI / "checkpoint", "cpu", torch.bfloat16, blocks)
    conditions = pipe.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png")
    latents = pipe.sample(conditions, 6, 7.0, latents=midi_golden["pipe.latents0"])
    assert latents.dtype == torch.float32
    assert relative_error(latents, midi_golden["pipe.latents6"]) < 0.1  # guidance 7 amplifies bf16's 1e-2


def test_a_model_brings_its_own_sampling_defaults(midi, tmp_path, monkeypatch):
    """Steps, guidance and grid depth travel in model_index.json; the published models have none and get 50, 7.0, 8."""
    assert midi.sampling == Sampling(50, 7.0, 8)
    midi.save(tmp_path / "own")
    index = tmp_path / "own" / "model_index.json"
    values = json.loads(index.read_text())
    values["_midilite_sampling"] = {"num_inference_steps": 2, "guidance_scale": 1.0, "grid_depth": 4}
    index.write_text(json.dumps(values))
    pipe = midilite.load_pipeline(tmp_path / "own", device="cpu")
    steps = []
    pipe(MIDI / "scene_rgb.png", MIDI / "scene_seg.png", num_tokens=8, on_step=lambda done, total: steps.append(total))
    assert steps == [2, 2]
    index.write_text(json.dumps({**values, "_midilite_sampling": {"steps": 3}}))
    with pytest.raises(ValueError, match="model_index.json: _midilite_sampling is .*num_inference_steps"):
        midilite.load_pipeline(tmp_path / "own", device="cpu")

"""The feature cache: right numbers, a key for every input, and no entry that lies."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_scenes import MIDI, TOKENS, entries, make, two_samples
from golden_files import GOLDEN, relative_error
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sample_factory import blocks, picture, scene_surfaces, sphere, write_front3d, write_sample

from midilite.common.seeds import torch_generator
from midilite.data import cache as cache_module
from midilite.data import features as feature_encoder
from midilite.data.cache import CacheWarning, FeatureCache
from midilite.data.scenes import find_scenes, read_scene
from midilite.model.folder import ModelFolder
from midilite.model.vae import sample_latents


@pytest.fixture
def scenes(tmp_path):
    return two_samples(tmp_path)


def assert_equal(a, b) -> None:
    for (name, left), (other, right) in zip(a.tensors().items(), b.tensors().items(), strict=True):
        assert name == other and left.dtype == right.dtype
        torch.testing.assert_close(left, right, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------------------- the numbers


def test_conditions_equal_the_golden_ones(tmp_path, midi_golden):
    """What training sees of a picture is what the reference's pipeline computes of it."""
    folder = tmp_path / "data" / "golden"
    folder.mkdir(parents=True)
    shutil.copy(MIDI / "scene_rgb.png", folder / "scene_rgb.png")
    shutil.copy(MIDI / "scene_seg.png", folder / "seg.png")
    count = midi_golden["enc.embeds_1"].shape[0]
    np.save(folder / "surface.npy", scene_surfaces(count))
    (scene,) = find_scenes(tmp_path / "data")
    cache = make(tmp_path)
    cache.prepare([scene])
    features = cache.load(scene)
    assert relative_error(features.clip.reshape(midi_golden["enc.embeds_1"].shape), midi_golden["enc.embeds_1"]) < 1e-5
    assert relative_error(features.dinov2, midi_golden["enc.embeds_2"]) < 1e-5


def test_latents_equal_the_encoder(tmp_path, scenes, midi_vae):
    """Mean and log-variance of each instance, from points drawn by (seed, "fps", scene)."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    features = cache.load(scenes[0])
    generator = torch_generator(5, "fps", "a")
    mean, logvar = midi_vae.encode(read_scene(scenes[0]).surfaces, TOKENS, generator)
    torch.testing.assert_close(features.mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features.logvar, logvar, atol=1e-6, rtol=1e-6)
    assert features.mask_share.tolist() == pytest.approx([6 * 32 / (48 * 40)] * 2)
    assert len(features) == 2 == cache.num_instances(scenes[0])


def test_chunks_do_not_matter(tmp_path, scenes, monkeypatch):
    """Rooms have more objects than fit an encoder at once; an instance must not depend on its neighbours."""
    whole = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS).load(scenes[0])
    monkeypatch.setattr(feature_encoder, "_CHUNK", 1)
    single = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS).load(scenes[0])
    for name, tensor in whole.tensors().items():
        assert relative_error(single.tensors()[name], tensor) < 1e-5, name


def test_cached_equals_live(tmp_path, scenes):
    """--no_cache is the same run."""
    cache = make(tmp_path, mask_variants=(0, 2))
    cache.prepare(scenes)
    live = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS, 5, mask_variants=(0, 2))
    said = []
    assert live.prepare(scenes, progress=lambda *a: said.append(a)).computed == 0 and "no cache" in said[0][2]
    for scene in scenes:
        assert live.num_instances(scene) == cache.num_instances(scene) == len(scene.instances)
        for variant in (0, 1):
            assert_equal(cache.load(scene, 0, variant), live.load(scene, 0, variant))


def test_features_can_be_trained_on(tmp_path, scenes):
    """Inference tensors can't be saved for backward; both sources must return ordinary ones."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    for source in (cache, FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS)):
        features = source.load(scenes[0])
        weight = torch.ones(features.dinov2.shape[-1], 3, requires_grad=True)
        latents = sample_latents(features.mean, features.logvar, torch_generator(1))
        ((features.dinov2 @ weight).sum() + latents.sum() + (features.clip * weight.sum()).sum()).backward()
        assert torch.isfinite(weight.grad).all()


def test_select_permutes_every_tensor(tmp_path, scenes):
    """Instance order is a permutation of rows: of all tensors alike."""
    features = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS).load(scenes[0])
    swapped = features.select(torch.tensor([1, 0]))
    for name, tensor in features.tensors().items():
        torch.testing.assert_close(swapped.tensors()[name], tensor.flip(0), atol=0, rtol=0)
    assert [c.shape[0] for c in features.select(torch.tensor([1])).conditions()] == [1, 1]


def test_triposg(tmp_path, scenes):
    """One condition: each instance on white through the 3-channel encoder."""
    folder = GOLDEN / "triposg_tiny" / "checkpoint"
    cache = make(tmp_path, folder)
    cache.prepare(scenes)
    features = cache.load(scenes[0])
    assert features.clip is None and len(features.conditions()) == 1
    model = ModelFolder(folder)
    mask = blocks([1, 2])
    alone = np.where((mask == 2)[..., None], np.asarray(picture(1)), 255).astype(np.uint8)
    pixels = model.load_preprocessors()[1](Image.fromarray(alone))
    with torch.no_grad():
        expected = model.load_dinov2()(pixels[None])
    torch.testing.assert_close(features.dinov2[1:], expected, atol=1e-5, rtol=1e-5)


def test_dtype_is_that_of_the_tokens(tmp_path, scenes):
    """bf16 halves the cache; the latents, which are targets, stay fp32."""
    cache = make(tmp_path, dtype=torch.bfloat16)
    cache.prepare(scenes)
    features = cache.load(scenes[0])
    assert features.dinov2.dtype == features.clip.dtype == torch.bfloat16
    assert features.mean.dtype == features.logvar.dtype == torch.float32
    exact = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS, 5).load(scenes[0])
    assert relative_error(features.dinov2.float(), exact.dinov2) < 0.03
    torch.testing.assert_close(features.mean, exact.mean, atol=0, rtol=0)


def test_too_few_points(tmp_path, scenes):
    """Named with both numbers, and the encoders are let go."""
    cache = make(tmp_path, num_tokens=65)
    with pytest.raises(ValueError, match="a: the surfaces have 64 points, fewer than the 65 latent tokens"):
        cache.prepare(scenes)
    assert not cache.encoder._networks and not entries(tmp_path)


# --------------------------------------------------------------------------------------------------- filling, resuming


def test_prepare_once(tmp_path, scenes, monkeypatch):
    """The second run finds everything and loads no encoder; the announced size is what is written."""
    said = []
    cache = make(tmp_path, mask_variants=(0, 1, -1))
    first = cache.prepare(scenes, progress=lambda *a: said.append(a))
    assert (first.computed, first.found) == (6, 0) and len(entries(tmp_path)) == 6
    assert said[0][:2] == (0, 2) and "2 views to encode" in said[0][2] and [s[:2] for s in said[1:]] == [(1, 2), (2, 2)]
    announced = sum(3 * cache.encoder.feature_bytes(len(s.instances)) for s in scenes)
    assert announced <= first.bytes_written < announced + 6 * 1024, "safetensors headers are all that is added"
    assert not cache.encoder._networks
    monkeypatch.setattr(ModelFolder, "load_vae", lambda *a: pytest.fail("an encoder was loaded"))
    monkeypatch.setattr(ModelFolder, "load_dinov2", lambda *a: pytest.fail("an encoder was loaded"))
    again = make(tmp_path, mask_variants=(0, 1, -1)).prepare(scenes)
    assert (again.computed, again.found, again.bytes_written) == (0, 6, 0)


def test_interrupted_and_continued(tmp_path, scenes):
    """ctrl-C after one scene: the next run computes the rest only, and nothing half-written is there."""

    def stop(done, total, text):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).prepare(scenes, progress=stop)
    assert len(entries(tmp_path)) == 1 and not list((tmp_path / "cache").rglob("*.tmp"))
    result = make(tmp_path).prepare(scenes)
    assert (result.computed, result.found) == (1, 1)


def test_ranks_share_the_work(tmp_path, scenes):
    """Every view belongs to exactly one process, whatever the others have done already."""
    write_sample(tmp_path / "data" / "c", sphere(64), [1], seed=3)
    scenes = find_scenes(tmp_path / "data")
    assert [make(tmp_path).prepare(scenes, rank, 2).computed for rank in (0, 1)] == [2, 1]
    assert make(tmp_path).prepare(scenes).found == 3
    single = FeatureCache(tmp_path / "other", ModelFolder(MIDI / "checkpoint"), TOKENS, 5)
    single.prepare(scenes)
    for scene in scenes:
        assert_equal(make(tmp_path).load(scene), single.load(scene))


def test_same_input_same_bytes(tmp_path, scenes):
    """The cache is a function of its key."""
    make(tmp_path).prepare(scenes)
    before = {path: path.read_bytes() for path in entries(tmp_path)}
    shutil.rmtree(tmp_path / "cache")
    make(tmp_path).prepare(scenes)
    assert {path: path.read_bytes() for path in entries(tmp_path)} == before


def test_too_little_space_is_said_before_the_work(tmp_path, scenes, monkeypatch):
    """Hours of encoding that end on a full disk help nobody."""
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"needs .* GiB more, 0.00 GiB are free.*--no_cache"):
        make(tmp_path).prepare(scenes)


def test_full_disk_while_writing(tmp_path, scenes, monkeypatch):
    """The entry is named, and no half-written one is left."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("midilite.model.weights.save_file", full)
    with pytest.raises(OSError, match="the cache can't be written .*No space left.*--no_cache"):
        make(tmp_path).prepare(scenes)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


# ------------------------------------------------------------------------------------------------------------- damage


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        flip_last_byte,
        lambda p: p.write_bytes(p.read_bytes()[:-5]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\xff" * 100),
        lambda p: save_file({"other": torch.zeros(1)}, p),
    ],
    ids=["flipped bit", "truncated", "empty", "garbage", "other tensors"],
)
def test_damaged_entries_are_computed_again(tmp_path, scenes, damage):
    """Also a single flipped bit, which safetensors does not notice."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    expected, path = cache.load(scenes[0]), cache.path(scenes[0])
    original = path.read_bytes()
    damage(path)
    with pytest.warns(CacheWarning, match="a: the cache entry .* is damaged"):
        assert_equal(make(tmp_path).load(scenes[0]), expected)
    assert path.read_bytes() == original


def test_prepare_repairs_truncated_entries(tmp_path, scenes):
    """Before the run starts rather than in the middle of it."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    path = cache.path(scenes[0])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(CacheWarning, match="damaged"):
        assert make(tmp_path).prepare(scenes).computed == 1


def test_entry_removed_during_the_run(tmp_path, scenes):
    """Somebody cleans up: the features are computed again; if the data is gone, too, the file is named."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    expected = cache.load(scenes[0])
    cache.path(scenes[0]).unlink()
    with pytest.warns(CacheWarning, match="a: view 0 is not in the cache"):
        assert_equal(cache.load(scenes[0]), expected)
    cache.path(scenes[0]).unlink()
    (tmp_path / "data" / "a" / "surface.npy").unlink()
    with pytest.raises(ValueError, match="surface.npy: is missing"), warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        cache.load(scenes[0])


def test_non_finite_features_are_refused(tmp_path, scenes, monkeypatch):
    """fp16 overflows in some encoders; a cached infinity would poison every step."""
    monkeypatch.setattr(
        feature_encoder.SceneEncoder, "latents", lambda self, data: (torch.full((2, 3, 4), torch.inf),) * 2
    )
    with pytest.raises(ValueError, match=r"a: the encoders gave NaN or infinity \(mean, logvar\) in torch.float32"):
        make(tmp_path).prepare(scenes)
    assert not entries(tmp_path)


# -------------------------------------------------------------------------------------------------------------- views


def test_views_of_a_room(tmp_path, monkeypatch):
    """One entry per view; hidden objects have no row; surfaces are encoded once for the views that show the same."""
    calls = []
    original = feature_encoder.SceneEncoder.latents
    monkeypatch.setattr(
        feature_encoder.SceneEncoder, "latents", lambda self, data: calls.append(data.indices) or original(self, data)
    )
    scenes = find_scenes(write_front3d(tmp_path / "data"))
    cache = make(tmp_path)
    assert cache.prepare(scenes).computed == 4 and calls == [(0, 1, 2), (0, 2), (0,)]
    counts = [cache.num_instances(scenes[0], view) for view in range(3)]
    live = FeatureCache(None, ModelFolder(MIDI / "checkpoint"), TOKENS, 5)
    assert counts == [3, 2, 3] == [len(cache.load(scenes[0], view)) for view in range(3)]
    assert counts == [live.num_instances(scenes[0], view) for view in range(3)]
    torch.testing.assert_close(cache.load(scenes[0], 0).mean, cache.load(scenes[0], 2).mean, atol=0, rtol=0)
    assert not torch.equal(cache.load(scenes[0], 0).dinov2, cache.load(scenes[0], 2).dinov2)
    assert_equal(cache.load(scenes[0], 1), live.load(scenes[0], 1))


def test_variants_must_differ(tmp_path):
    """Two equal variants would be one entry."""
    for variants in ((), (1, 1)):
        with pytest.raises(ValueError, match="mask_variants"):
            make(tmp_path, mask_variants=variants)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        make(tmp_path, num_tokens=0)


def test_entry_format(tmp_path, scenes):
    """The format on disk, as the module's docstring states it."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    path = cache.path(scenes[0])
    assert path.parent.name == path.stem[:2] and len(path.stem) == 40
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["scene"] == "a" and len(file.metadata()["digest"]) == 32
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert shapes == {
        "clip": [2, 1, 24],
        "dinov2": [2, 50, 40],
        "mean": [2, 12, 8],
        "logvar": [2, 12, 8],
        "mask_share": [2],
    }


def test_loading_hashes_nothing_twice(tmp_path, scenes, monkeypatch):
    """Loading happens at every step: inputs and entry are hashed at the first time only."""
    cache = make(tmp_path)
    cache.prepare(scenes)
    first = cache.load(scenes[0])
    monkeypatch.setattr(cache_module, "file_digest", lambda path: pytest.fail(f"{path} was hashed again"))
    monkeypatch.setattr(cache_module, "_digest", lambda tensors: pytest.fail("the entry was hashed again"))
    assert_equal(cache.load(scenes[0]), first)

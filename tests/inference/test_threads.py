"""One pipeline in several threads: every call has the adapters and scales that it asked for, and leaves them alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_files import GOLDEN

import midilite
from midilite import lora
from midilite.inference import pipeline

MIDI = GOLDEN / "midi_tiny"
SCALES = (0.0, 0.25, 0.5, 1.0, {"default": 2.0}, {}, 0.75, {"default": 0.5})
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "num_tokens": 16, "grid_depth": 3}


@pytest.fixture
def pipe(monkeypatch):
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device="cpu")
    pipe.load_adapter(MIDI / "lora" / "lora_weights.pth", scale=0.9, lora_alpha=8.0)
    monkeypatch.setattr(pipeline, "decode_meshes", lambda vae, latents, *rest: [object()] * len(latents))
    monkeypatch.setattr(pipeline, "build_scene", lambda *arguments: None)
    return pipe


def latents(pipe, scale, seed=42):
    return pipe(MIDI / "scene_rgb.png", MIDI / "scene_seg.png", seed=seed, adapter_scale=scale, **CALL).latents


def at_once(functions):
    """The results of functions that all start together, each in a thread of its own."""
    barrier = threading.Barrier(len(functions))

    def started(function):
        barrier.wait(30)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(started, functions))


def test_eight_threads_with_eight_scales(pipe):
    """Past bug: 4 of 8 latents were those of another call's scale, and the weights were wrong afterwards."""
    expected = [latents(pipe, scale) for scale in SCALES]
    for _ in range(3):
        found = at_once([lambda scale=scale: latents(pipe, scale) for scale in SCALES])
        assert all(map(torch.equal, found, expected))
        assert lora.active_weights(pipe.networks) == {"default": 0.9}


def test_two_pipelines_of_one_transformer(pipe):
    parts = "layout transformer vae scheduler clip dinov2 clip_preprocessor dinov2_preprocessor sampling world".split()
    other = pipeline.Pipeline(**{name: getattr(pipe, name) for name in parts})
    expected = latents(pipe, 0.0), latents(pipe, 1.0)
    for _ in range(3):
        found = at_once([lambda: latents(pipe, 0.0), lambda: latents(other, 1.0)])
        assert all(map(torch.equal, found, expected))


def test_adapters_that_are_changed_meanwhile_wait_for_the_call(pipe):
    """A call that has begun ends with the adapters that it began with."""
    expected, begun, changed = latents(pipe, 1.0), threading.Event(), []

    def change():
        begun.wait(30)
        pipe.set_adapters({"default": 0.1})
        pipe.unload_adapters()
        changed.append(True)

    def on_step(done, total):
        begun.set()
        assert not changed

    thread = threading.Thread(target=change)
    thread.start()
    found = pipe(MIDI / "scene_rgb.png", MIDI / "scene_seg.png", on_step=on_step, **CALL).latents
    thread.join(30)
    assert changed and torch.equal(found, expected) and not lora.adapter_names(pipe.networks)


def test_a_call_may_use_the_pipeline_itself(pipe):
    """From `on_step`, for a preview: the thread that is in a call is let in again."""
    seen = []
    result = pipe(
        MIDI / "scene_rgb.png", MIDI / "scene_seg.png", on_step=lambda *_: seen.append(pipe.default_num_tokens), **CALL
    )
    again = pipe.sample(
        result.conditions, 1, 1.0, num_tokens=16, on_step=lambda *_: pipe.set_adapters({"default": 0.9})
    )
    assert len(seen) == 2 and len(again) == len(result.latents)


def test_a_call_that_fails_lets_the_next_one_in(pipe):
    for _ in range(2):
        with pytest.raises(ValueError, match="no adapter named"):
            latents(pipe, {"nobody": 1.0})
    assert at_once([lambda: latents(pipe, 0.5)] * 2)[0] is not None

"""Adapters that train on the image encoders: the same draws, right gradients, one file, nothing disturbed."""

import dataclasses
import json
import shutil

import pytest
import torch
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file
from training_runs import assert_same_training, text

import midilite
from midilite import lora
from midilite.commands import train
from midilite.commands.dry_run import run_dry
from midilite.common.distributed import World
from midilite.data.scenes import find_scenes
from midilite.evaluation.scenes import Evaluation
from midilite.evaluation.validation import Validation
from midilite.inference.sampling import initial_noise
from midilite.model.folder import ModelFolder
from midilite.training.objective import SceneBatch
from midilite.training.options import TrainOptions
from midilite.training.tasks.image_encoders import encode
from midilite.training.trainer import Trainer

ADAPTER = "adapter_model.safetensors"
IMAGE_ENCODERS = {"midi_tiny": ["image_encoder_1", "image_encoder_2"], "triposg_tiny": ["image_encoder_dinov2"]}
CPU = torch.device("cpu")


@pytest.fixture
def options(options) -> TrainOptions:
    return dataclasses.replace(
        options, learning_rate=5e-3, batch_size=2, condition_dropout=0.3, train_image_encoders=True
    )


def of_kind(options, kind):
    return dataclasses.replace(options, pretrained_model=str(GOLDEN / kind / "checkpoint"))


def make_task(options):
    folder = ModelFolder(options.pretrained_model)
    features = train.open_features(folder, options, CPU, 16)
    scenes = find_scenes(options.data_dir)
    features.prepare(scenes)
    return train.make_task(train.training_base(folder, options, CPU), folder, scenes, features, options, CPU)


def scramble(task, size=0.05):
    """Move every trained weight, as training does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", IMAGE_ENCODERS)
def test_a_fresh_task_has_the_losses_of_one_that_reads_conditions_from_the_cache(options, kind):
    """The same instances, noise, noise levels and dropped conditions; views and mask variants, too."""
    options = dataclasses.replace(of_kind(options, kind), mask_variants=(0, 3), max_num_instances=2)
    encoders, plain = make_task(options), make_task(dataclasses.replace(options, train_image_encoders=False))
    dropped = 0
    for step in range(8):
        scenes = [step % 5, (step + 2) % 5]
        first, second = encoders.draw(scenes, step), plain.draw(scenes, step)
        for a, b in zip(first.scenes, second.scenes, strict=True):
            assert torch.equal(a.noised, b.noised) and torch.equal(a.target, b.target)
            assert (a.sigma, a.groups, a.dropped) == (b.sigma, b.groups, b.dropped)
            dropped += a.dropped
        (loss, losses), (expected, all_expected) = encoders.loss(first, 4), plain.loss(second, 4)
        assert relative_error(losses, all_expected) < 1e-5 and relative_error(loss, expected) < 1e-5
    assert 0 < dropped < 16


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", IMAGE_ENCODERS)
def test_gradients_are_the_slopes_of_the_loss(options, kind, checkpointed):
    """Central differences along the weights of every network in turn; dropped scenes give encoders none.

    Networks in fp64, but norms and the loss itself are fp32: 6e-8 of the loss is 1e-4 of a difference quotient.
    """
    task = make_task(dataclasses.replace(of_kind(options, kind), gradient_checkpointing=checkpointed))
    task.networks.double()
    scramble(task)
    batches = [task.draw([scene], 0) for scene in range(5)]
    kept = next(b for b in batches if not b.scenes[0].dropped)
    kept = SceneBatch((in_fp64(kept.scenes[0]), dataclasses.replace(in_fp64(kept.scenes[0]), dropped=True)))
    loss, _ = task.loss(kept, kept.num_instances)
    loss.backward()
    names = {key.split(".")[0] for key in task.parameters}
    assert names == {"blocks", *IMAGE_ENCODERS[kind]}
    for name in names:
        own = {key: p for key, p in task.parameters.items() if key.startswith(name) and p.grad is not None}
        still = {key for key in task.parameters if key.startswith(name)} - own.keys()
        assert all(".attn2.to_q." in key for key in still) and (name == "blocks" or not still)
        generator = torch.Generator().manual_seed(1)
        direction = {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in own.items()}
        slope = sum((p.grad * direction[key]).sum() for key, p in own.items())
        ends = [loss_at(task, own, direction, kept, sign * 5e-4) for sign in (1, -1)]
        assert abs(slope) > 0.01
        assert (ends[0] - ends[1]) / 1e-3 == pytest.approx(slope.item(), rel=5e-3)
    task.networks.zero_grad()
    zeroed = SceneBatch(tuple(dataclasses.replace(scene, dropped=True) for scene in kept.scenes))
    task.loss(zeroed, 4)[0].backward()
    assert all(p.grad is None for key, p in task.parameters.items() if key.startswith("image_encoder"))


@pytest.mark.parametrize(
    "base, limit",
    [
        ({"gradient_checkpointing": True, "offload_blocks": True}, 1e-6),
        ({"gradient_checkpointing": "selective"}, 1e-6),
        ({"quantize_base": "int8"}, 0.15),
    ],
)
def test_gradients_reach_the_encoders_through_every_form_of_the_base(options, base, limit):
    """Eight bits change the base by a percent, so gradients by some."""
    found = {}
    for name, changes in (("plain", {}), ("other", base)):
        task = make_task(dataclasses.replace(options, **changes, condition_dropout=0.0))
        scramble(task)
        batch = task.draw([0], 0)
        task.loss(batch, batch.num_instances)[0].backward()
        encoders = [p.grad.flatten() for key, p in task.parameters.items() if key.startswith("image_encoder")]
        found[name] = torch.cat(encoders)
    assert relative_error(found["other"], found["plain"]) <= limit and found["plain"].any()


def in_fp64(scene):
    return dataclasses.replace(scene, noised=scene.noised.double(), target=scene.target.double())


@torch.no_grad()
def loss_at(task, parameters, direction, batch, step):
    for key, p in parameters.items():
        p.add_(direction[key], alpha=step)
    loss = task.loss(batch, batch.num_instances)[0].item()
    for key, p in parameters.items():
        p.sub_(direction[key], alpha=step)
    return loss


def test_only_adapters_train_and_defaults_are_the_encoders_attention(options):
    task = make_task(options)
    before = {key: value.clone() for key, value in task.networks.state_dict().items()}
    Trainer(task, options, World(), CPU).train()
    assert all(torch.equal(before[key], value) for key, value in task.networks.state_dict().items())
    last = {".".join(m.split(".")[-2:]) for m in task.modules if m.startswith("image_encoder_2")}
    assert last == {"attention.query", "attention.key", "attention.value", "output.dense"}
    last = {m.split(".")[-1] for m in task.modules if m.startswith("image_encoder_1")}
    assert last == {"q_proj", "k_proj", "v_proj", "out_proj"}
    moved = {key for key, p in task.parameters.items() if key.endswith("lora_B.weight") and p.any()}
    assert {key.split(".")[0] for key in moved} == {"blocks", *IMAGE_ENCODERS["midi_tiny"]}


# ------------------------------------------------------------------------------------------------- what becomes of it


KINDS = {
    "lora": {},
    "patterns": {
        "lora_target_modules": ("*",),
        "lora_image_encoder_targets": ("image_encoder_2.*.fc1", "q_proj"),
        "lora_rank_pattern": ("image_encoder_2.*=2", "blocks.1.*=3"),
        "use_rslora": True,
    },
    "dora, pissa": {"use_dora": True, "lora_init": "pissa", "lora_target_modules": ("to_q",)},
}


@pytest.mark.parametrize("kind", IMAGE_ENCODERS)
@pytest.mark.parametrize("settings", KINDS)
def test_the_pipeline_with_the_saved_file_does_what_the_trained_networks_do(options, tmp_path, settings, kind):
    changes = dict(KINDS[settings])
    if kind == "triposg_tiny" and settings == "patterns":
        changes |= {
            "lora_image_encoder_targets": ("image_encoder_dinov2.*.fc1",),
            "lora_rank_pattern": ("blocks.1.*=3",),
        }
    options = dataclasses.replace(of_kind(options, kind), **changes)
    task = make_task(options)
    Trainer(task, options, World(), CPU).train()
    task.save_weights(tmp_path / "adapter")
    scene = find_scenes(options.data_dir)[0]
    evaluation = Evaluation(task.transformer, task.features, ModelFolder(options.pretrained_model), [scene], options)
    task.networks.eval()
    features = task.features.load(scene)
    with torch.no_grad():
        noise = initial_noise(len(features), 16, task.transformer, 0)
        groups, time = [len(features)], torch.full((len(features),), 500.0)
        trained = task.transformer(noise, time, *features.conditions(), groups=groups)
        assert len(evaluation.generate(scene, None, decode=False).meshes) == len(features)
    names = {key.split(".")[2] for key in load_file(tmp_path / "adapter" / ADAPTER)}
    assert names == {"transformer", *IMAGE_ENCODERS[kind]}
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "lora_weights.pth"):
        pipe = midilite.load_pipeline(options.pretrained_model, device="cpu")
        pixels = task.features.load_pixels(scene).pixels
        base = encode(encoders_of(pipe), pixels)
        pipe.load_adapter(path)
        conditions = encode(encoders_of(pipe), pixels)
        with torch.no_grad():
            found = pipe.transformer(noise, time, *conditions, groups=groups)
        assert relative_error(found, trained) < 1e-5
        for own, expected, plain in zip(conditions, features.conditions(), base, strict=True):
            assert relative_error(own, expected) < 1e-5 < relative_error(expected, plain) / 10
        pipe.unload_adapters()
        assert all(torch.equal(a, b) for a, b in zip(encode(encoders_of(pipe), pixels), base, strict=True))


def encoders_of(pipe):
    encoders = {pipe.layout.clip: pipe.clip, pipe.layout.dinov2: pipe.dinov2}
    return torch.nn.ModuleDict({name: encoder for name, encoder in encoders.items() if encoder is not None})


def test_a_picture_is_encoded_by_the_pipeline_as_in_training(options, tmp_path):
    """From the files of a sample, through masks and preprocessors, to what the adapted encoders make of it."""
    task = make_task(options)
    scramble(task)
    task.save_weights(tmp_path / "adapter")
    pipe = midilite.load_pipeline(options.pretrained_model, device="cpu")
    pipe.load_adapter(tmp_path / "adapter")
    task.networks.eval()
    for scene in find_scenes(options.data_dir):
        found = pipe.encode_images(scene.image, scene.image.parent / "seg.png")
        for own, expected in zip(found.tensors(), task.features.load(scene).conditions(), strict=True):
            assert relative_error(own, expected) < 1e-5


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_resumed_run_is_the_uninterrupted_run(options, tmp_path):
    options = dataclasses.replace(options, lora_dropout=0.2, mixed_precision="bf16", ema_decay=0.9)
    run = lambda **changes: train.train_lora(dataclasses.replace(options, **changes)) / ADAPTER  # noqa: E731
    whole = run(output_dir=str(tmp_path / "whole"), checkpointing_steps=4).read_bytes()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    assert run(output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest").read_bytes() == whole


def test_watching_changes_nothing_and_sees_the_image_encoders(options, quick_model, tmp_path):
    """Validation loss, generated scenes and the comparison use the encoders as they are, and the base without any."""
    options = dataclasses.replace(
        options, pretrained_model=quick_model, lora_dropout=0.3, val_fraction=0.2, max_train_steps=4, ema_decay=0.5
    )
    quiet = dataclasses.replace(options, validate_every=0, preview_every=0, output_dir=str(tmp_path / "quiet"))
    watched = dataclasses.replace(
        options, validate_every=2, eval_every=4, preview_every=4,
        eval_scenes=1,
    )  # fmt: skip
    assert (train.train_lora(quiet) / ADAPTER).read_bytes() == (train.train_lora(watched) / ADAPTER).read_bytes()
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    logged = [line for line in lines if "val_loss" in line]
    assert len(logged) == 2 and logged[0]["val_loss"] != logged[1]["val_loss"] != logged[1]["val_loss_ema"]
    plain = dataclasses.replace(
        options, train_image_encoders=False, validate_every=2, output_dir=str(tmp_path / "plain"), max_train_steps=2
    )
    train.train_lora(plain)
    expected = [json.loads(line) for line in open(tmp_path / "plain" / "metrics.jsonl")][-1]
    assert logged[0]["val_loss_base"] == pytest.approx(expected["val_loss_base"], rel=1e-6)


def test_validation_depends_on_the_encoders_adapters(options):
    task = make_task(options)
    validation = Validation(task.transformer, task.features, task.scenes[:2], options, task.networks)
    before = validation.measure(World(), CPU)
    with torch.no_grad():
        for key, parameter in task.parameters.items():
            if key.startswith("image_encoder"):
                parameter.add_(0.1)
    after = validation.measure(World(), CPU)
    assert all(abs(a - b) > 1e-5 * a for a, b in zip(after, before, strict=True))
    assert all(module.training for module in task.networks.modules())
    with lora.temporary_weights(task.networks, {}):
        assert validation.measure(World(), CPU) == before


def test_no_cache_trains_the_same(options, tmp_path):
    first = train.train_lora(options)
    second = train.train_lora(dataclasses.replace(options, no_cache=True, output_dir=str(tmp_path / "live")))
    a, b = load_file(first / ADAPTER), load_file(second / ADAPTER)
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)


@pytest.mark.parametrize("more", [[], ["--shard_base"]])
def test_two_processes_train_as_one_does(forks, flags, tmp_path, more):
    common = ["--max_train_steps", 10, "--train_image_encoders"]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(one, *common, "--batch_size", 4)) == 0, log.read_text()
    codes = forks.run_group("train", log, arguments=flags(two, *common, "--batch_size", 2, *more))
    assert codes == [0, 0], text(log, 0) + text(log, 1)
    assert_same_training(two, one)


def test_a_dry_run_counts_the_image_encoders(options):
    """And computes its steps through them."""
    with_image_encoders = run_dry(dataclasses.replace(options, resume_from_checkpoint=None)).trainable
    without = run_dry(dataclasses.replace(options, train_image_encoders=False)).trainable
    assert with_image_encoders - without == sum(
        p.numel() for key, p in make_task(options).parameters.items() if key.startswith("image_encoder")
    )


def test_unusable_options(options):
    with pytest.raises(ValueError, match="lora_image_encoder_targets is given without train_image_encoders"):
        dataclasses.replace(options, train_image_encoders=False, lora_image_encoder_targets=("q_proj",))
    with pytest.raises(ValueError, match="LoRA target 'to_q' matches no linear layer; last names that exist: .*q_proj"):
        make_task(dataclasses.replace(options, lora_image_encoder_targets=("to_q",)))

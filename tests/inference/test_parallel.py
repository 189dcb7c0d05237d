"""A scene made by several processes: what one of them would make, the same bits on all, and no waiting for the dead."""

import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file

import midilite
from midilite.common import distributed
from midilite.common.distributed import World
from midilite.inference import parallel as parallel_inference
from midilite.inference.decoding import decode_meshes
from midilite.inference.parallel import best_split, shared_velocity
from midilite.inference.sampling import sample
from midilite.model.config import Sampling

MIDI = GOLDEN / "midi_tiny"
FAST = "--num_inference_steps 3 --guidance_scale 2 --num_tokens 16 --grid_depth 4 --device cpu".split()


def output(log, rank) -> str:
    return Path(f"{log}.{rank}").read_text()


def results(forks, log, function, size, device="cpu") -> list[dict]:
    """What a function of this file returned in each process."""
    pids = forks.start_group("call", log, size, {"TEST_DEVICE": device}, module="test_parallel", function=function)
    codes = [forks.wait(pid) for pid in pids]
    assert codes == [0] * size, "".join(output(log, rank) for rank in range(size))
    return [json.loads(output(log, rank).splitlines()[-1]) for rank in range(size)]


def sample_in_every_way() -> dict:
    """In each of several processes: errors against the recorded latents and one process, and a hash of the latents."""
    world, device = distributed.start(os.environ["TEST_DEVICE"])
    blocks = json.loads((MIDI / "golden.json").read_text())["multi_instance_blocks"]
    golden = load_file(MIDI / "golden.safetensors")
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device, torch.float32, multi_instance_blocks=blocks)
    given = (golden["enc.embeds_1"], golden["enc.embeds_2"])
    found = {}

    def check(name, split, scale=7.0, steps=6, count=3, recorded=None, low_memory=False, **ways):
        inputs = (pipe.transformer, pipe.scheduler, [c[:count] for c in given], golden["pipe.latents0"][:count])
        expected = sample(*inputs, Sampling(steps, scale, **ways)).cpu()
        together = partial(shared_velocity, world=world, split=split, low_memory=low_memory)
        latents = sample(*inputs, Sampling(steps, scale, **ways), together).cpu()
        error = relative_error(latents, expected)
        of_record = relative_error(latents, golden[recorded]) if recorded else 0.0
        found[name] = [error, of_record, hashlib.sha256(latents.numpy().tobytes()).hexdigest()]

    with torch.inference_mode():
        for split in parallel_inference.SPLITS:
            check(split, split, recorded="pipe.latents6")
            check(f"low memory, {split}", split, recorded="pipe.latents6", low_memory=True)
            check(f"sometimes guided, {split}", split, solver="ab2", guidance_interval=(0.3, 0.9))
        check("unguided", "instances", 1.0, 4, recorded="pipe.latents4_noguidance")
        check("chosen", None, recorded="pipe.latents6")
        check("one instance", None, count=1)
        check("two instances", "instances", count=2)
        check("nothing to share", None, 1.0, count=1)
        pipe.load_adapter(MIDI / "lora" / "lora_weights.pth", lora_alpha=8)
        for split in parallel_inference.SPLITS:
            check(f"adapter, {split}", split)
        found["triposg"] = triposg_by_halves(world, device)
        assert not any("attend" in vars(block) for block in pipe.transformer.blocks), "blocks are as they were"
        found["shapes"] = decoded(pipe, golden["pipe.latents6"].to(device), world)
    distributed.stop()
    return found


def triposg_by_halves(world, device) -> list:
    """One condition, one instance, no multi-instance blocks."""
    pipe = midilite.load_pipeline(GOLDEN / "triposg_tiny" / "checkpoint", device, torch.float32, world=world)
    golden = load_file(GOLDEN / "triposg_tiny" / "golden.safetensors")
    conditions = pipe.encode_images(GOLDEN / "triposg_tiny" / "object_rgb.png")
    latents = pipe.sample(conditions, 6, 7.0, latents=golden["pipe.latents0"]).cpu()
    error = relative_error(latents, golden["pipe.latents6"])
    return [0.0, error, hashlib.sha256(latents.numpy().tobytes()).hexdigest()]


def decoded(pipe, latents, world) -> bool:
    """Whether objects dealt out to the processes are those of one process; the second has no surface."""
    field = pipe.vae.field
    pipe.vae.field = lambda x: field(x) if not x.equal(latents[1]) else lambda points: points.new_ones(len(points))
    with pytest.warns(pipe_warning(), match="instance 7 has no surface"):
        mine = decode_meshes(pipe.vae, latents, [3, 7, 9], 4, world=world)
        whole = decode_meshes(pipe.vae, latents, [3, 7, 9], 4)
    assert [mesh is None for mesh in mine] == [mesh is None for mesh in whole] == [False, True, False]
    return all(np.allclose(mine[i].vertices, whole[i].vertices, rtol=0, atol=1e-5) for i in (0, 2))


def pipe_warning():
    from midilite.inference.pipeline import NoSurfaceWarning

    return NoSurfaceWarning


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize(
    ("device", "size"), [("cpu", 2), ("cpu", 3), pytest.param("cuda", 2, marks=TWO_GPUS)], ids=["2", "3", "2 GPUs"]
)
def test_latents_are_those_of_one_process_and_of_the_reference(forks, tmp_path, device, size):
    """fp32: 1e-5 against one process (products of other sizes round differently), 1e-4 against the record, as alone."""
    found = results(forks, tmp_path / "log", "sample_in_every_way", size, device)
    assert found[0]["shapes"] and len(found[0]) == 15
    for name in found[0].keys() - {"shapes"}:
        error, of_record, _ = found[0][name]
        assert error < 1e-5 and of_record < 1e-4, (name, error, of_record)
        assert len({tuple(each[name]) for each in found}) == 1, f"{name}: ranks differ"


def test_an_adapter_acts_in_both_ways_of_sharing(forks, tmp_path):
    """Else the test above could not tell an adapter that is left out on all ranks."""
    pipe = midilite.load_pipeline(MIDI / "checkpoint", "cpu")
    golden = load_file(MIDI / "golden.safetensors")
    inputs = [golden["enc.embeds_1"], golden["enc.embeds_2"]], golden["pipe.latents0"], Sampling(2)
    with torch.inference_mode():
        base = sample(pipe.transformer, pipe.scheduler, *inputs)
        pipe.load_adapter(MIDI / "lora" / "lora_weights.pth", lora_alpha=8)
        assert relative_error(sample(pipe.transformer, pipe.scheduler, *inputs), base) > 1e-3


def test_the_split_with_less_for_the_busiest_rank_is_taken():
    assert [best_split(n, 2, True) for n in (1, 2, 3, 4, 7)] == [
        "guidance", "instances", "guidance", "instances", "guidance",
    ]  # fmt: skip
    assert [best_split(n, 2, False) for n in (1, 2, 3)] == [None, "instances", "instances"]
    assert best_split(4, 4, True) == "instances" and best_split(4, 1, True) is None


def test_the_cost_of_a_half_is_what_the_operations_say():
    """The constant in best_split against a count of the published size's operations."""
    from midilite.model.config import DiTConfig
    from midilite.model.dit import DiT
    from midilite.training.flops import transformer_flops

    with torch.device("meta"):
        model = DiT(DiTConfig())
    for n in (1, 4, 7):
        without, known = (
            transformer_flops(model, [n], 2048, [1, 1370], backward=False, unconditional=none, projected=True)
            for none in (n, 0)
        )
        assert known / (known + without) == pytest.approx(parallel_inference._CONDITIONAL_HALF, abs=0.01)


def test_an_unknown_split_is_refused(midi_dit):
    for split, scale in (("halves", 7.0), ("guidance", 1.0)):
        with pytest.raises(ValueError, match=f"split is '{split}'"):
            shared_velocity(midi_dit, [], torch.zeros(1, 4, 8), Sampling(2, scale), World(), split)


# ------------------------------------------------------------------------------------------------------- the command


def arguments(path, *more) -> list[str]:
    images = ["--rgb_image", str(MIDI / "scene_rgb.png"), "--seg_image", str(MIDI / "scene_seg.png")]
    return ["--pretrained_model", str(MIDI / "checkpoint"), *images, "--output", str(path), *FAST, *more]


def test_the_command_in_two_processes_writes_the_scene_of_one(forks, tmp_path):
    assert forks.run("train", tmp_path / "log", arguments=arguments(tmp_path / "one.glb"), command="infer") == 0
    log = tmp_path / "log"
    codes = forks.run_group("train", log, arguments=arguments(tmp_path / "two.glb"), command="infer")
    assert codes == [0, 0], output(log, 0) + output(log, 1)
    assert "on cpu and 1 more" in output(log, 0) and output(log, 0).count("two.glb: ") == 1 and not output(log, 1)
    one, two = (trimesh.load(tmp_path / f"{name}.glb") for name in ("one", "two"))
    assert list(one.geometry) == list(two.geometry) and (tmp_path / "two.png").is_file()
    assert np.abs(one.bounds - two.bounds).max() < 1e-3


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_both_with_its_message(forks, tmp_path, rank):
    log, before = tmp_path / "log", time.monotonic()
    codes = forks.run_group("infer_with_a_failing_rank", log, arguments=arguments(tmp_path / "a.glb"), rank=rank)
    assert codes == [1, 1] and time.monotonic() - before < 60
    assert f"infer.py: error on rank {rank}: broken on purpose" in output(log, rank)
    assert f"rank {1 - rank} lost another process" in output(log, 1 - rank) and not os.path.exists(tmp_path / "a.glb")


def test_an_unusable_image_is_told_by_every_rank(forks, tmp_path):
    """All fail alike, so nobody waits."""
    log = tmp_path / "log"
    bad = [*arguments(tmp_path / "a.glb"), "--rgb_image", str(tmp_path / "nowhere.png")]
    assert forks.run_group("train", log, arguments=bad, command="infer") == [1, 1]
    assert all("nowhere.png" in output(log, rank).splitlines()[-1] for rank in (0, 1))

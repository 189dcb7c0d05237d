"""Several processes: the same training as in one, whatever is uneven; failures that end all; sharding and balancing."""

import itertools
import json
import math
import re
import threading
import time

import pytest
import torch
from golden_files import GOLDEN, golden_dit
from safetensors.torch import load_file
from training_runs import assert_same_training, losses, text

from midilite import lora
from midilite.common import distributed
from midilite.common.distributed import World
from midilite.runtime import sharding
from midilite.training.plan import Plan

# ------------------------------------------------------------------------------------------------- the same training


@pytest.fixture(scope="module")
def alone(forks, prepared, tmp_path_factory):
    """Ten steps of one process that takes four of five scenes at a time: every second step takes the one left."""
    folder, started = tmp_path_factory.mktemp("alone"), []

    def get(flags):
        if not started:
            started.append(forks.run("train", folder / "log", arguments=flags(folder, *TEN, "--batch_size", 4)))
        assert started == [0], (folder / "log").read_text()
        return folder

    return get


TEN = ["--max_train_steps", 10]
SPLITS = {
    "2 x 2": (2, ["--batch_size", 2]),
    "4 x 1": (4, ["--batch_size", 1]),
    "2 x 1, accumulated": (2, ["--batch_size", 1, "--gradient_accumulation_steps", 2]),
    "2 x 2, balanced": (2, ["--batch_size", 2, "--balance_scenes"]),
    "2 x 2, sharded": (2, ["--batch_size", 2, "--shard_base"]),
    "2 x 1, accumulated, sharded, checkpointed": (
        2,
        ["--batch_size", 1, "--gradient_accumulation_steps", 2, "--shard_base", "--gradient_checkpointing"],
    ),
}


@pytest.mark.parametrize("split", SPLITS)
def test_processes_train_as_one_does(forks, flags, tmp_path, alone, split):
    """Scenes have one to three instances, and in every second step all but one process have nothing to do."""
    size, more = SPLITS[split]
    log, folder = tmp_path / "log", tmp_path / "run"
    codes = forks.run_group("train", log, size, arguments=flags(folder, *TEN, *more))
    assert codes == [0] * size, text(log, 0) + text(log, 1)
    assert_same_training(folder, alone(flags))


def test_scenes_of_the_tests_are_uneven(prepared):
    """Else the tests above would hold less than they say."""
    from midilite.data.scenes import find_scenes

    counts = [len(scene.instances) for scene in find_scenes(prepared)]
    assert len(counts) == 5 and len(set(counts)) > 1


def test_every_process_draws_its_own_dropout(forks, flags, tmp_path):
    log = tmp_path / "log"
    arguments = flags(tmp_path / "run", "--max_train_steps", 3, "--lora_dropout", 0.5)
    assert forks.run_group("train_telling_dropout", log, arguments=arguments) == [0, 0]
    draws = [re.findall(r"draws (\[.*\])", text(log, rank)) for rank in (0, 1)]
    assert len(draws[0]) == len(draws[1]) + 1 == 3  # the third step has one scene left, for rank 0
    assert len({*draws[0], *draws[1]}) == 5


def test_one_rank_writes(forks, flags, tmp_path):
    """No file twice, and no line of progress from the others."""
    log, folder = tmp_path / "log", tmp_path / "run"
    arguments = flags(folder, "--max_train_steps", 4, "--checkpointing_steps", 2)
    assert forks.run_group("train", log, arguments=arguments) == [0, 0]
    assert len(losses(folder)) == 4 and len(list(folder.glob("events.*"))) <= 1
    assert text(log, 0).count("step 4/4") == 1 and "step" not in text(log, 1)


# --------------------------------------------------------------------------------------------------------- failures


def test_an_error_on_one_rank_ends_all_with_its_message(forks, flags, tmp_path):
    log = tmp_path / "log"
    arguments = flags(tmp_path / "run", "--max_train_steps", 1000)
    before = time.monotonic()
    codes = forks.run_group("train_with_a_failing_sample", log, arguments=arguments, rank=1, step=3)
    assert codes == [1, 1] and time.monotonic() - before < 60
    assert text(log, 1).splitlines()[-1] == "train.py: error on rank 1: scene_7/surface.npy: broken on purpose"
    assert "error on rank 0: rank 0 lost another process" in text(log, 0).splitlines()[-1]
    assert "Traceback" not in text(log, 0) + text(log, 1)


def test_an_unusable_checkpoint_ends_all_before_anything_is_encoded(forks, flags, tmp_path):
    """Rank 0 looks for it; the others learn of its failure instead of waiting for its answer."""
    log = tmp_path / "log"
    codes = forks.run_group("train", log, arguments=flags(tmp_path / "run", "--resume_from_checkpoint", "gone"))
    assert codes == [1, 1]
    assert "error on rank 0: gone: no such checkpoint folder" in text(log, 0) and "encoded" not in text(log, 0)


def test_sharding_needs_partners(forks, flags, tmp_path):
    assert forks.run("train", tmp_path / "log", arguments=flags(tmp_path / "run", *TEN, "--shard_base")) == 1
    assert "start several with torchrun" in (tmp_path / "log").read_text()


# --------------------------------------------------------------------------------------------------------- sharding


def shard_and_measure() -> dict:
    """In each of two processes: bytes before and after, gradients against those of the whole network, saving."""
    from midilite.model.fingerprint import base_fingerprint

    world, device = distributed.start("cpu")
    golden = load_file(GOLDEN / "midi_tiny" / "golden.safetensors")
    found, gradients = {}, []
    for split in (False, True):
        model = golden_dit("midi_tiny").train()
        lora.inject(model, lora.LoRAConfig(rank=4, alpha=8.0), seed=3)
        lora.freeze_base(model)
        parameters = lora.adapter_parameters(model)
        with torch.no_grad():
            for i, parameter in enumerate(parameters.values()):
                parameter.add_(torch.full_like(parameter, 0.01 * math.cos(i)))
        found[f"bytes {split}"] = sharding.local_bytes(model) - sum(p.nbytes for p in parameters.values())
        if split:
            before = base_fingerprint(model)
            sharding.shard_base(model, parameters.values(), world, device)
            found["bytes sharded"] = sharding.local_bytes(model) - sum(p.nbytes for p in parameters.values())
            assert not any(hasattr(p, "to_local") for p in parameters.values()), "the adapter stays whole"
            model.gradient_checkpointing = "full"
        out = model(*(golden[f"mit.{name}"] for name in ("x", "t", "e1", "e2")), groups=[2, 1, 1, 3, 1])
        out.square().mean().backward()
        with torch.no_grad():  # as generation does it: conditions are projected once, outside of a forward pass
            projected = model.project_conditions(golden["mit.e1"], golden["mit.e2"])
            assert torch.equal(model(golden["mit.x"], golden["mit.t"], projected, groups=[2, 1, 1, 3, 1]), out)
        gradients.append({key: p.grad for key, p in parameters.items() if p.grad is not None})
        found[f"loss {split}"] = out.square().mean().item()
    found["bytes after"] = sharding.local_bytes(model) - sum(p.nbytes for p in parameters.values())
    whole, sharded = gradients
    found["gradients"] = max(((whole[k] - sharded[k]).norm() / whole[k].norm().clamp_min(1e-12)).item() for k in whole)
    found["same keys"] = whole.keys() == sharded.keys()
    state = lora.adapter_state(model)
    found["saved"] = all(type(value) is torch.Tensor for value in state.values()) and bool(before)
    distributed.stop()
    return found


def test_a_sharded_base_is_half_as_large_and_computes_the_same(forks, tmp_path):
    log = tmp_path / "log"
    assert forks.run_group("call", log, module="test_distributed", function="shard_and_measure") == [0, 0]
    for rank in (0, 1):
        found = json.loads(text(log, rank).splitlines()[-1])
        assert found["loss True"] == pytest.approx(found["loss False"], rel=1e-6)
        assert found["gradients"] < 1e-5 and found["same keys"] and found["saved"]
        # rows are split: what has an odd number of them is padded, so a little more than half
        assert found["bytes sharded"] < 0.52 * found["bytes True"]
        assert found["bytes after"] == found["bytes sharded"], "gathered blocks are dropped again"


# -------------------------------------------------------------------------------------------------------- balancing


def _seen(plan: Plan, step: int) -> list[list[int]]:
    return [[s for batch in plan.batches(step, rank) for s in batch] for rank in range(plan.world_size)]


@pytest.mark.parametrize("shape", [(11, 2, 1, 2), (40, 1, 3, 4), (7, 4, 2, 2), (3, 2, 2, 4)])
def test_balanced_scenes_are_all_seen_once_and_in_the_same_step(shape):
    generator = torch.Generator().manual_seed(0)
    costs = tuple((torch.randint(1, 8, (shape[0],), generator=generator) ** 2).tolist())
    plain, balanced = Plan(*shape, seed=5), Plan(*shape, seed=5, costs=costs)
    for epoch in range(3):
        steps = range(epoch * plain.steps_per_epoch, (epoch + 1) * plain.steps_per_epoch)
        shares = [_seen(balanced, step) for step in steps]
        assert sorted(s for step in shares for share in step for s in share) == list(range(shape[0]))
        for step, seen in zip(steps, shares, strict=True):
            assert sorted(sum(seen, [])) == sorted(plain.scenes(step))
            assert max(map(len, seen)) <= plain.batch_size * plain.accumulation
            assert seen == _seen(balanced, step)
            assert all(len(b) <= plain.batch_size for rank in range(shape[3]) for b in balanced.batches(step, rank))
            assert balanced.passes(step) == max(len(balanced.batches(step, rank)) for rank in range(shape[3]))


def test_balancing_takes_little_more_than_the_best_deal():
    """Against all ways to deal six scenes to two processes, three each: at most 7/6 of the best (Graham 1969)."""
    gains = []
    for seed in range(50):
        costs = tuple((torch.randint(1, 8, (6,), generator=torch.Generator().manual_seed(seed)) ** 2).tolist())

        def slowest(shares, costs=costs):
            return max(sum(costs[s] for s in share) for share in shares)

        found = slowest(_seen(Plan(6, 3, 1, 2, seed=seed, costs=costs), 0))
        halves = itertools.combinations(range(6), 3)
        best = min(slowest((half, set(range(6)) - set(half))) for half in halves)
        assert best <= found <= 7 / 6 * best + 1e-9
        gains.append(slowest(_seen(Plan(6, 3, 1, 2, seed=seed), 0)) / found)
    assert min(gains) > 0.999 and sum(gains) / len(gains) > 1.1


def test_costs_grow_with_instances_and_faster_where_they_attend_to_each_other(midi_dit):
    from midilite.training.flops import transformer_flops

    def cost(n, together):
        return transformer_flops(midi_dit, [n] if together else [1] * n, 64, [1, 10])

    assert cost(4, False) == 4 * cost(1, False)
    assert cost(4, True) > 4 * cost(1, True) and cost(8, True) / cost(4, True) > 2


# ------------------------------------------------------------------------------------------------------- one process


def test_alone_nothing_communicates():
    """No process group is needed for any of it."""
    world = World()
    parameter = torch.nn.Parameter(torch.ones(2))
    distributed.sum_gradients([parameter], world)
    assert parameter.grad is None
    world.barrier()
    assert world.broadcast(lambda: 3) == 3
    values = torch.ones(2)
    assert distributed.sum_over_ranks(values, world) is values
    assert not torch.distributed.is_initialized()


def test_a_restart_never_meets_the_addresses_of_dead_processes():
    """Past bug (torch 2.13): torchrun's store outlives a restart, and gloo connected to ports of killed processes."""
    store = torch.distributed.HashStore()

    def start(number, late, size=3):
        """Each rank in a thread; returns what each finds under a key that all but the late one have written."""
        found = {}

        def join(rank):
            if rank == late:
                time.sleep(0.2)
            mine = distributed._fresh(store, World(rank, size))
            assert not mine.check([f"address/{rank}"]), "left by an earlier start"
            mine.set(f"address/{rank}", f"{rank} of start {number}")
            found[rank] = [mine.get(f"address/{r}").decode() for r in range(size)]

        threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(found) == list(range(size))
        assert all(value == [f"{r} of start {number}" for r in range(size)] for value in found.values())

    for number, late in enumerate([None, 0, 1, 0, 2]):
        start(number, late)


def gpus(monkeypatch, count):
    """Let torch think that there are some."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices_follow_the_local_rank(monkeypatch):
    """On the second node of two, global rank 3 is the second process of its machine and takes the second GPU."""
    joined, chosen = [], []
    gpus(monkeypatch, 2)
    monkeypatch.setattr(distributed, "_join", lambda world, device, timeout: joined.append(device))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    world, device = distributed.start("cuda")
    assert (world.rank, world.size, world.local_rank, world.is_main) == (3, 4, 1, False)
    assert device == torch.device("cuda", 1) and chosen == joined == [device]
    assert distributed.start("cpu")[1] == torch.device("cpu") and joined == [device, torch.device("cpu")]


def test_a_device_has_a_number(monkeypatch):
    """Past bug: torch.cuda.set_device refuses a device without one, so no single process could train on a GPU."""
    gpus(monkeypatch, 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: torch._utils._get_device_index(device))
    for given, number in ((None, 0), ("cuda", 0), ("cuda:3", 3)):
        assert distributed.start(given)[1] == torch.device("cuda", number)

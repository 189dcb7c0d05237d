"""The benchmarks of several processes in their CPU form: numbers for every case; failures of cases and of ranks."""

import json
from pathlib import Path

import pytest
from benchmarks import restart


def text(log, rank) -> str:
    return Path(f"{log}.{rank}").read_text()


def benchmark(forks, log, *words) -> dict:
    """The benchmark's CPU form in two processes: what it prints on the main rank."""
    small = ["--device", "cpu", "--output", f"{log}.jsonl", "--scenes", 4, "--passes", 2, "--instances", 1, 2]
    small += ["--num_tokens", 8, "--fp32_tokens", 8, "--loss_steps", 2, "--steps", 2, "--fp32_steps", 2, *words]
    codes = forks.run_group("train", log, arguments=list(map(str, small)), command="benchmarks/distributed")
    assert codes == [0, 0], text(log, 0) + text(log, 1)
    return json.loads(text(log, 0).splitlines()[-1])


def test_the_benchmark_of_training_runs_in_two_processes(forks, tmp_path):
    """Cases on the tiny model: the same losses in one process and two, half the base each."""
    names = ["one", "per process", "total", "balanced total", "same losses", "sharded"]
    found = benchmark(forks, tmp_path / "log", "--cases", *names)
    cases = {result["case"]: result for result in found["results"]}
    assert list(cases) == names and not found["failed"] and not found["left_out"]
    assert [cases[name]["processes"] for name in names if name != "same losses"] == [1, 2, 2, 2, 2]
    assert all(cases[name]["scenes_per_second"] > 0 for name in names if name != "same losses")
    assert all(0 < cases[n]["sending_share"] + cases[n]["waiting_share"] < 1 for n in names[1:] if n != "same losses")
    assert cases["sharded"]["base_mib"] < 0.52 * cases["per process"]["base_mib"]
    assert cases["balanced total"]["losses"] == pytest.approx(cases["one"]["losses"], rel=1e-5)
    assert found["comparison"]["largest_difference_of_losses"] < 1e-5
    assert found["comparison"]["largest_difference_of_losses_fp32"] < 1e-5
    assert {"speedup_per_process", "speedup_total", "sharded_step_time"} <= found["comparison"].keys()


def test_the_benchmark_of_inference_runs_in_two_processes(forks, tmp_path):
    """Both ways of sharing and a whole scene; latents to 1e-5 (fp32)."""
    words = ["--cases", "denoising", "whole scenes", "small gpus", "--scene_instances", 1, 2, "--whole_instances", 2]
    found = benchmark(forks, tmp_path / "log", *words)
    cases = {result["case"]: result for result in found["results"]}
    assert list(cases) == ["denoising", "whole scenes", "small gpus"] and not found["failed"]
    one, two = (cases["denoising"]["scenes"][n] for n in ("1", "2"))
    assert set(one["ms_per_step"]) == {"one", "guidance"} and set(two["ms_per_step"]) == {
        "one",
        "guidance",
        "instances",
    }
    for row in (one, two):
        assert all(distance["relative"] < 1e-5 for distance in row["distance_to_one"].values())
    assert cases["whole scenes"]["scenes"]["2"]["speedup"] > 0
    page, words = tmp_path / "page", ["--markdown", str(tmp_path / "log.jsonl")]
    assert forks.run("train", page, arguments=words, command="benchmarks/distributed") == 0, page.read_text()
    lines = page.read_text().splitlines()
    assert [line.count("|") for line in lines] == [9, 9, 9, 0, 7, 7, 7, 7, 0, 0] and "picture to GLB" in lines[-1]


def test_a_case_that_hangs_is_ended_and_left_out_next_time(forks, tmp_path):
    """Results are on the disk as they come; torchrun's restart goes on with the next case."""
    log = tmp_path / "log"
    arguments = ["--device", "cpu", "--output", f"{log}.jsonl", "--scenes", "2", "--passes", "2", "--instances", "1"]
    slow = [
        *arguments,
        "--cases",
        "one",
        "denoising",
        "--scene_instances",
        "1",
        "--steps",
        "1000",
        "--num_tokens",
        "256",
    ]
    codes = forks.run_group("train", log, arguments=[*slow, "--limit_seconds", "8"], command="benchmarks/distributed")
    assert codes == [1, 1]
    again = forks.start_group(
        "train", log, arguments=slow, command="benchmarks/distributed", environment={"TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert [forks.wait(pid) for pid in again] == [0, 0]
    found = json.loads(text(log, 0).splitlines()[-1])
    assert [result["case"] for result in found["results"]] == ["one"]
    assert found["failed"] == {"denoising": "took more than 8 s"}


def test_torchrun_restarts_after_a_killed_rank_and_reaches_the_same_adapter(flags, tmp_path, capsys):
    """The real launcher: rank 1 is killed once; `--max-restarts 1` continues without being told to resume."""
    command = ["--device", "cpu", "--steps", "40", "--runs", "whole", "killed", "--work", str(tmp_path / "work"), "--"]
    options = flags("replaced", "--checkpointing_steps", 5)
    options = options[: options.index("--output_dir")] + options[options.index("--output_dir") + 2 :]
    code, told = restart.main([*command, *options]), capsys.readouterr()
    assert code == 0, told.err
    found = json.loads(told.out.splitlines()[-1])
    assert found["killed_same_bytes"] and not found["problems"]
    killed, whole = found["runs"]["killed"], found["runs"]["whole"]
    assert killed["steps"] == whole["steps"] == 40 and 20 < killed["killed_after_steps"] < 40
    assert len(found["resumed_at_step"]) == 1, "it went back once"
    assert found["resumed_at_step"][0] % 5 == 1 and found["resumed_at_step"][0] > 5, "to a checkpoint"
    assert killed["seconds_until_all_ended"] < 60

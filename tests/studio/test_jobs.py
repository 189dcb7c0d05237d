"""Scenes made one after the other: progress, cancelling, failures, results and their downloads."""

import io
import json
import re
import time

import pytest
import trimesh

from midilite.studio.jobs import MOST_WAITING

WISH = {"picture": "rgb.png", "mask": "seg.png", "model": "model"}


def glb_names(content: bytes) -> set[str]:
    return set(trimesh.load(io.BytesIO(content), file_type="glb").geometry)


def add(studio, **more) -> int:
    status, content, _ = studio.ask("/api/job", {**WISH, **more})
    assert status == 200, content
    return json.loads(content)["job"]


def wait(studio, job: int) -> dict:
    end = time.monotonic() + 120
    while (now := json.loads(studio.ask(f"/api/job?job={job}")[1]))["state"] in ("waiting", "working"):
        assert time.monotonic() < end, now
        time.sleep(0.05)
    return now


def test_a_scene_is_made_listed_and_downloaded_whole_and_in_parts(studio):
    done = wait(studio, add(studio, seed=7))
    assert done["state"] == "done", done["doing"]
    folder = studio.start / done["result"]
    assert {path.name for path in folder.iterdir()} == {"scene.glb", "scene.html", "rgb.png", "seg.png", "facts.json"}
    results = json.loads(studio.ask("/api/results")[1])
    assert [(one["name"], one["seed"], one["model"]) for one in results] == [(done["result"], 7, "model")]
    names = set(trimesh.load(folder / "scene.glb").geometry)
    assert names and names <= {"instance_1", "instance_2", "instance_3"}
    for suffix in (".glb", ".obj", ".stl"):
        for name in (None, sorted(names)[0]):
            part = "" if name is None else f"&object={name}"
            status, content, headers = studio.ask(f"/api/download?path={done['result']}&format={suffix}{part}")
            assert status == 200 and headers["Content-Disposition"].startswith("attachment")
            assert len(trimesh.load(io.BytesIO(content), file_type=suffix[1:], force="mesh").faces) > 10
            if suffix != ".stl":
                found = re.findall(r"(?m)^o (\w+)$", content.decode()) if suffix == ".obj" else glb_names(content)
                assert set(found) == (names if name is None else {name})
    assert studio.ask(f"/api/download?path={done['result']}&object=sofa")[0] == 400
    status, labels, _ = studio.ask(f"/api/mask?picture={done['result']}/rgb.png&path={done['result']}/seg.png")
    assert status == 200 and set(labels) == {0, 1, 2, 3}


def test_jobs_wait_in_turn_and_each_tab_has_its_own(studio):
    first, second, third = add(studio, seed=1), add(studio, seed=2), add(studio, seed=3)
    assert studio.ask("/api/cancel", {"job": second})[0] == 200
    states = [wait(studio, job) for job in (first, second, third)]
    assert [one["state"] for one in states] == ["done", "cancelled", "done"]
    assert [one["wish"]["seed"] for one in states] == [1, 2, 3]
    assert len(json.loads(studio.ask("/api/results")[1])) == 2


def test_the_job_at_work_is_cancelled_between_steps(studio):
    job = add(studio, steps=1000)
    while json.loads(studio.ask(f"/api/job?job={job}")[1])["done"] < 2:
        time.sleep(0.02)
    studio.ask("/api/cancel", {"job": job})
    now = wait(studio, job)
    assert now["state"] == "cancelled" and now["done"] < 1000 and not json.loads(studio.ask("/api/results")[1])


def test_a_job_that_fails_says_why_and_the_next_one_is_made(studio):
    failed = wait(studio, add(studio, fast=True))
    assert failed["state"] == "failed" and "has no speed adapter" in failed["doing"]
    assert str(studio.start.parent) not in failed["doing"]
    assert wait(studio, add(studio))["state"] == "done"


def test_the_queue_has_an_end(studio):
    jobs = [add(studio, steps=1000)]
    while json.loads(studio.ask(f"/api/job?job={jobs[0]}")[1])["state"] != "working":
        time.sleep(0.02)
    jobs += [add(studio) for _ in range(MOST_WAITING)]
    status, content, _ = studio.ask("/api/job", WISH)
    assert status == 400 and b"wait already" in content
    for job in jobs:
        studio.ask("/api/cancel", {"job": job})


@pytest.mark.parametrize("scales", [(1.0,), (0.0, 0.5)])
def test_adapters_come_with_a_strength_each_and_go_again(studio, scales, forks, flags, tmp_path):
    run = studio.start / "run"
    assert forks.run_group("train", tmp_path / "log", 1, arguments=flags(run, "--max_train_steps", 1)) == [0]
    adapters = [{"path": "run/lora-final", "scale": scale} for scale in scales]
    assert "run/lora-final" in json.loads(studio.ask("/api/home")[1])["adapters"]
    assert wait(studio, add(studio, adapters=adapters))["state"] == "done"
    _, pipe = studio.server.studio.jobs._loaded
    assert sorted(pipe.adapters.values()) == sorted(scales)
    assert wait(studio, add(studio))["state"] == "done" and not pipe.adapters
    state = json.loads(studio.ask("/api/run?path=run")[1])
    assert not state["alive"] and state["curves"]["loss"] and "rank 4" in state["adapters"][0]["facts"]

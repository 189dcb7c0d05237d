"""Attacks of every kind, generated from seeds: whatever is thrown at a command, it computes rightly or says why not.

MIDILITE_ATTACKS=1000 tries so many instead of a few; MIDILITE_ATTACK_SEED chooses others. A table tells what survived.
What survival means is said in helpers/attack_sandbox.py.
"""

import collections
import json
import os
import random
import shutil
import sys
import zlib

import pytest
from attack_mutations import NUMBERS, WORDS, damage, mutated, mutated_tensors
from attack_sandbox import BASE, READS, Sandbox, complaints, make_inputs, snapshot
from checkpoints import forge
from golden_files import GOLDEN
from safetensors.torch import load_file, save_file
from trimesh import creation

from midilite.commands.launch import COMMANDS, _named
from midilite.common.options import entries_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TOTAL, SEED = int(os.environ.get("MIDILITE_ATTACKS", 16)), int(os.environ.get("MIDILITE_ATTACK_SEED", 0))
SHARES = {
    "damaged files": 0.4,
    "options": 0.3,
    "hostile checkpoints": 0.15,
    "resume with changes": 0.1,
    "at once": 0.05,
}
# these ask for more work, and get it: only values that can't be, or that are small
WORK = {
    "max_train_steps", "num_epochs", "num_inference_steps", "grid_depth", "num_samples", "image_size", "num_views",
    "num_scenes", "compose", "num_points", "eval_inference_steps", "eval_grid_depth", "eval_every", "preview_every",
    "validate_every", "compare_scenes", "num_workers", "max_scenes", "num_tokens", "batch_size",
}  # fmt: skip
PLACES = {
    "contact_sheet",
    "output_dir",
    "output",
    "chart",
    "out",
    "files",
    "file",
    "cache_dir",
    "compile",
}  # compiling takes minutes


@pytest.fixture(scope="module")
def table():
    found = collections.defaultdict(lambda: [0, 0])
    yield found
    lines = ["", f"{'attack':22} tried  survived", *(f"{k:22} {n:5}  {s:8}" for k, (n, s) in found.items())]
    print("\n".join(lines), file=sys.__stderr__)


@pytest.fixture(scope="module")
def sandbox(forks, prepared, tmp_path_factory):
    """Inputs with a trained adapter among them, and what the smallest command takes of memory."""
    inputs, meshes = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("meshes")
    creation.box((1.0, 0.4, 0.6)).export(meshes / "box.ply")
    creation.icosphere(subdivisions=1, radius=0.4).export(meshes / "ball.obj")
    creation.cylinder(0.3, 1.0, sections=8).export(meshes / "post.glb")
    make_inputs(inputs, prepared, GOLDEN / "midi_tiny" / "checkpoint", meshes)
    made = Sandbox(forks, inputs, tmp_path_factory.mktemp("cases"))
    case = made.fresh()
    outcome = made.run(case, *BASE["train"])
    assert outcome.code == 0, outcome.text
    shutil.copytree(case / "out" / "run" / "lora-final", inputs / "adapter")
    shutil.copytree(case / "out" / "run", made.folder / "finished")
    shutil.copytree(case / "out" / "cache", made.folder / "cache")
    made.baseline = outcome.memory
    return made


def judged(sandbox, case, before, command, arguments, what):
    """Run an attacked command; fails with everything that tells the case again."""
    outcome = sandbox.run(case, command, arguments)
    wrong = complaints(case, before, outcome)
    return [f"{what}: {'; '.join(wrong)}\n  {command} {arguments}\n  {outcome.text[-700:]}"] if wrong else []


def damaged_files(sandbox, rng):
    name = rng.choice(sorted(BASE))
    case, (command, arguments) = sandbox.fresh(), BASE[name]
    files = [path for pattern in READS[name] for path in sorted((case / "in").glob(pattern)) if path.is_file()]
    path = rng.choice(files)
    how = damage(path, rng)
    if command == "train":
        shutil.copytree(sandbox.folder / "cache", case / "out" / "cache")
    return judged(sandbox, case, snapshot(case / "in"), command, arguments, f"{path.relative_to(case)} {how}")


def options(sandbox, rng):
    name = rng.choice(sorted(BASE))
    case, (command, arguments) = sandbox.fresh(), BASE[name]
    classes = _named(COMMANDS[command][0])
    entries = entries_of(classes[arguments[0]] if isinstance(classes, dict) else classes)
    chosen = rng.sample(sorted(entries.keys() - PLACES), min(rng.randint(1, 3), len(entries.keys() - PLACES)))
    more = []
    for option in chosen:
        entry, words = entries[option], [*WORDS, *map(str, NUMBERS)]
        if option in WORK:
            words = ["0", "-1", "1", "2", "nan", "x", "", "1.5", "1e400", "9" * 30]
        values = [
            rng.choice(words + list(entry.choices or ()) * 4) for _ in range(rng.randint(1, 2) if entry.many else 1)
        ]
        more += [f"--{option}"] if entry.kind is bool else [f"--{option}", *values]
    if command == "train":
        shutil.copytree(sandbox.folder / "cache", case / "out" / "cache")
    return judged(sandbox, case, snapshot(case / "in"), command, [*arguments, *more], " ".join(more))


def continued(more=()):
    command, arguments = BASE["train"]
    return command, [*arguments, "--resume_from_checkpoint", "latest", "--max_train_steps", "2", *more]


def hostile_checkpoints(sandbox, rng):
    case = sandbox.fresh()
    shutil.copytree(sandbox.folder / "finished", case / "out" / "run")
    shutil.copytree(sandbox.folder / "cache", case / "out" / "cache")
    for name in ("lora-final", "config.yaml"):
        path = case / "out" / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = case / "out" / "run" / "checkpoint-2"
    which = rng.choice(("state", "state", "weights", "optimizer", "manifest"))
    if which == "state":
        forge(folder, state=lambda state: mutated(state, rng))
    elif which == "manifest":
        path = folder / "manifest.json"
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
    else:
        path = folder / f"{which}.safetensors"
        save_file(mutated_tensors(load_file(path), rng), path)
        forge(folder)
    return judged(sandbox, case, snapshot(case / "in"), *continued(), f"checkpoint's {which}")


def resume_with_changes(sandbox, rng):
    """Whatever is different: refused, or (it alters nothing) the adapter of the run that was not interrupted."""
    case = sandbox.fresh()
    shutil.copytree(sandbox.folder / "finished", case / "out" / "run")
    shutil.copytree(sandbox.folder / "cache", case / "out" / "cache")
    final = case / "out" / "run" / "lora-final" / "adapter_model.safetensors"
    expected = final.read_bytes()
    shutil.rmtree(final.parent)
    inputs, more = case / "in", []
    kind = rng.randrange(4)
    if kind == 0:
        shutil.rmtree(rng.choice([path for path in sorted((inputs / "data").iterdir()) if path.is_dir()]))
    elif kind == 1:
        first, second = rng.sample(sorted((inputs / "data").glob("*/surface.npy")), 2)
        shutil.copy(first, second)
    elif kind == 2:
        path = rng.choice(sorted((inputs / "model").glob("*/*.safetensors")))
        tensors = load_file(path)
        key = rng.choice(sorted(tensors))
        save_file({**tensors, key: tensors[key] * 1.001}, path, {"format": "pt"})
    else:
        more = rng.choice([["--seed", "8"], ["--lora_rank", "3"], ["--logging_steps", "2"], ["--val_fraction", "0.6"]])
    found = judged(sandbox, case, snapshot(inputs), *continued(more), f"resume, change {kind} {more}")
    if final.exists() and final.read_bytes() != expected:
        found.append(f"resume, change {kind} {more}: another adapter, and nobody was told")
    return found


def at_once(sandbox, rng):
    """Two runs in one folder: one is refused. Two that share a cache: both make what each makes alone."""
    case, (command, arguments) = sandbox.fresh(), BASE["train"]
    together = rng.random() < 0.5
    second = arguments if together else [word.replace("out/run", "out/other") for word in arguments]
    before, found = snapshot(case / "in"), []
    logs = [sandbox.folder / f"{case.name}.{i}.log" for i in range(2)]
    pids = [sandbox.start(case, command, words, log) for words, log in zip((arguments, second), logs, strict=True)]
    ended = [sandbox.outcome(log, sandbox.forks.wait(pid, 120)) for pid, log in zip(pids, logs, strict=True)]
    for outcome in ended:
        found += complaints(case, before, outcome)
    expected = (sandbox.folder / "finished" / "lora-final" / "adapter_model.safetensors").read_bytes()
    made = [path.read_bytes() for path in (case / "out").glob("*/lora-final/adapter_model.safetensors")]
    if len(made) != (1 if together else 2) or any(content != expected for content in made):
        found.append(f"{len(made)} adapters, {sum(content == expected for content in made)} of them right")
    return [f"at once, {'one folder' if together else 'one cache'}: {found}"] if found else []


KINDS = {
    "damaged files": damaged_files,
    "options": options,
    "hostile checkpoints": hostile_checkpoints,
    "resume with changes": resume_with_changes,
    "at once": at_once,
}


@pytest.mark.parametrize("kind", KINDS)
def test_attacks(kind, sandbox, table):
    problems = []
    only = os.environ.get("MIDILITE_ATTACK_ONLY")  # the number of one that failed
    for number in [int(only)] if only else range(max(1, round(SHARES[kind] * TOTAL))):
        try:
            found = KINDS[kind](sandbox, random.Random(zlib.crc32(f"{SEED} {kind} {number}".encode())))
        except Exception as error:  # of the attack, not of what is attacked: the others are tried all the same
            found = [f"could not be tried: {error!r}"]
        table[kind][0] += 1
        table[kind][1] += not found
        problems += [f"#{number} {text}" for text in found]
        shutil.rmtree(sandbox.folder / f"case-{sandbox.count}", ignore_errors=True)
        if found and os.environ.get("MIDILITE_ATTACK_LOG"):
            with open(os.environ["MIDILITE_ATTACK_LOG"], "a") as file:
                file.write(f"{kind} #{number} {found[0]}\n\n")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", sorted(BASE.keys() - {"train"}))
def test_unharmed_the_commands_work(name, sandbox):
    """Without this, the attacks would mean nothing."""
    case = sandbox.fresh()
    outcome = sandbox.run(case, *BASE[name])
    assert outcome.code == 0 and not complaints(case, snapshot(sandbox.inputs), outcome), outcome.text

"""README and pages: short, with links that lead somewhere, defaults that are the defaults, and commands that run.

The commands of the pages' blocks marked `bash tested` run as they stand, in order, in a folder that has what they name:
the shipped model stands in for the published weights. Added are only flags that make them quick.
"""

import dataclasses
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from trimesh import creation

from midilite.commands.infer import EXAMPLE
from midilite.commands.launch import run
from midilite.model.folder import ASSETS
from midilite.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md")), ROOT / "midilite" / "README.md"]
TESTED = ["your_data", "fine_tune", "troubleshooting"]
QUICK = {  # by command (and subcommand), after what the page says
    "train": "--device cpu --max_train_steps 2 --validate_every 1 --eval_every 0 --preview_every 0 --num_tokens 32 "
    "--mixed_precision no --checkpointing_steps 1",
    "train --task": "--device cpu --max_train_steps 1 --num_tokens 32 --teacher_steps 4 --checkpointing_steps 0",
    "infer": "--device cpu --num_inference_steps 3 --num_tokens 64 --grid_depth 4 --seed 0",
    "prepare_data --input_dir": "--num_samples 256 --image_size 64 --num_workers 1 --num_scenes 2",
}


# ------------------------------------------------------------------------------------------------------------ README


def test_the_readme_is_short_and_keeps_its_two_commands():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert "\n    pip install -e . && python examples/infer.py\n" in text
    assert "\n    pip install -e '.[test]' && ruff check . && ruff format --check . && python -m pytest -n 2\n" in text


def test_the_documented_defaults_are_the_defaults():
    """The table of the README, and what the documentation that users have gives in its command."""
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \| `--(\w+)` \| (\S+) \|$", README.read_text(encoding="utf-8"), re.M)
    told = {name: value for row in rows for name, value in (row[:2], row[2:])}
    documented = {
        "batch_size": 4, "num_epochs": 100, "learning_rate": 1e-4, "lora_rank": 16, "lora_alpha": 16.0,
        "lora_dropout": 0.1, "gradient_accumulation_steps": 1, "checkpointing_steps": 500, "save_every_n_epochs": 10,
        "seed": 42,
    }  # fmt: skip
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    assert {name: float(value) for name, value in told.items()} == documented
    assert {name: defaults[name] for name in documented} == documented


def test_flags_of_the_readme_exist(capsys):
    """Of the commands in its table and blocks: every flag is one of some command, or of torchrun and pip."""
    for command in ("train", "infer", "evaluate", "prepare_data"):
        with pytest.raises(SystemExit, match="^0$"):
            run(command, ["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    foreign = {"--local-dir", "--check", "--nproc_per_node", "--num_processes", "--logdir"}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README.read_text(encoding="utf-8")))
    assert used - known - foreign == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page if not file else page.parent / file
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target}"


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def long_description(monkeypatch):
    """The function of setup.py, which installs nothing here."""
    monkeypatch.setattr("setuptools.setup", lambda **given: None)
    return runpy.run_path(str(ROOT / "setup.py"))["long_description"]


def test_links_and_pictures_work_on_a_package_index(long_description):
    text = README.read_text(encoding="utf-8")
    shown = long_description(text, "https://host/owner/midilite/")
    pictures = re.findall(r"!\[[^]]*\]\((examples/[^)]+)\)", text)
    assert pictures and all(f"](https://host/owner/midilite/raw/HEAD/{picture})" in shown for picture in pictures)
    assert "(https://host/owner/midilite/blob/HEAD/examples/your_data.md)" in shown
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    assert len(targets) == len(re.findall(r"\]\(([^)\s]+)\)", text))


def test_without_an_address_nothing_of_it_is_broken(long_description):
    shown = long_description(README.read_text(encoding="utf-8"), "")
    assert "![" not in shown and "Your data says" in shown.replace("\n", " ")
    assert all(target.startswith(("https://", "#")) for target in re.findall(r"\]\(([^)\s]+)\)", shown))


# ------------------------------------------------------------------------------------------------------------- pages


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command in the blocks marked `bash tested`."""
    blocks = re.findall(r"^```bash tested\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as the pages take it to be, with the shipped model under the name of the published one."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "pretrained_weights").mkdir()
    (folder / "pretrained_weights" / "MIDI-3D").symlink_to(ASSETS / "tiny")
    (folder / "examples" / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "configs" / "lora_finetune.yaml", folder / "examples" / "configs")
    raw, data = folder / "data" / "raw_meshes", folder / "data" / "training_data"
    raw.mkdir(parents=True)
    creation.box((1.0, 0.4, 0.6)).export(raw / "box.ply")
    creation.icosphere(subdivisions=1, radius=0.4).export(raw / "ball.obj")
    for number in range(4):
        shutil.copytree(ASSETS / "demo" / f"composed_{number:06d}", data / f"scene_{number}")
    for name in ("rgb.png", "seg.png"):
        shutil.copy(EXAMPLE / name, folder)
    return folder


@pytest.mark.parametrize("name", TESTED)
def test_commands_of_the_pages_run(name, workplace, forks):
    commands = commands_of(ROOT / "examples" / f"{name}.md")
    assert commands
    for number, (python, script, *words) in enumerate(commands):
        assert python == "python" and script.startswith("examples/")
        command, log = Path(script).stem, workplace / f"{name}-{number}.log"
        quick = QUICK.get(f"{command} {words[0]}", QUICK.get(command, "") if words[0] != "--check" else "")
        code = forks.run("in_folder", log, command=command, arguments=[*words, *quick.split()], folder=str(workplace))
        assert code == 0, f"{' '.join([script, *words])}\n{log.read_text()[-3000:]}"


def test_the_script_of_the_page_from_python_runs(tmp_path, forks):
    script, log = ROOT / "examples" / "from_python.py", tmp_path / "log"
    started = forks.start("script_in_folder", log, path=str(script), folder=str(tmp_path))
    assert forks.wait(started, 600) == 0, log.read_text()[-3000:]
    out = tmp_path / "outputs" / "from_python"
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"scene.glb", "on_the_floor.glb", "space.safetensors", "evaluation.json", "run/loss.png"} <= made
    printed = log.read_text()
    assert "step 2: loss" in printed and "{'space': 0.5}" in printed

"""Norms, resizing and averages against the full matrices; the commands of examples/adapter.py; merged checkpoints."""

import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_samples import CONFIG, PATTERNED, SETTINGS, assert_same, random_adapter
from golden_files import GOLDEN, golden_dit, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

import midilite
from midilite import lora
from midilite.commands import adapter as adapter_work
from midilite.commands.adapter import report
from midilite.inference import pipeline
from midilite.lora.arithmetic import average, block_norms, block_of, change_norms, resize
from midilite.lora.files import AdapterFile, apply_adapter, describe, ranks_of, read_adapter, write_adapter
from midilite.model.config import Sampling
from midilite.model.folder import SAMPLING_KEY

MIDI = GOLDEN / "midi_tiny"


def full(adapter):
    """{module: s B A} in fp64."""
    state = {key: value.double() for key, value in adapter.state.items()}
    return {
        p: adapter.config.scale_of(p) * state[f"{p}.lora_B.weight"] @ state[f"{p}.lora_A.weight"]
        for p in ranks_of(adapter.state)
    }


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).parents[2] / "examples" / "adapter.py"
    spec = importlib.util.spec_from_file_location("adapter_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
def test_norms_are_those_of_the_full_matrices(kind):
    adapter = random_adapter(SETTINGS[kind])
    norms = change_norms(adapter)
    for path, change in full(adapter).items():
        assert norms[path] == pytest.approx(change.norm().item(), rel=1e-9)
    blocks = block_norms(norms)
    assert sum(v**2 for v in blocks.values()) == pytest.approx(sum(v**2 for v in norms.values()))
    numbers = [int(name.split(".")[1]) for name in blocks if name.startswith("blocks")]
    assert numbers == sorted(numbers)


def test_blocks_have_numbers_in_order():
    assert block_of("blocks.10.attn1.to_out.0") == "blocks.10" and block_of("proj_in") == "proj_in"
    assert block_of("image_encoder_2.encoder.layer.3.attention.query") == "image_encoder_2.encoder.layer.3"
    names = [f"blocks.{i}.ff.net.2" for i in (10, 2, 0)] + ["proj_in"]
    assert list(block_norms(dict.fromkeys(names, 1.0))) == ["blocks.0", "blocks.2", "blocks.10", "proj_in"]


@pytest.mark.parametrize("kind", ["lora", "rslora and patterns", "dora"])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_resizing_is_the_best_approximation_and_tells_its_error(kind, rank):
    """Oracle: the exact decomposition of the full matrices."""
    adapter = random_adapter(SETTINGS[kind])
    result = resize(adapter, rank)
    before, after = full(adapter), full(result.adapter)
    assert set(ranks_of(result.adapter.state).values()) == {rank}
    lost = whole = 0.0
    for path, change in before.items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert relative_error(after[path], best) < 1e-5, path
        error = (change - best).norm().item()
        assert result.errors[path] == pytest.approx(error / change.norm().item(), abs=1e-6)
        lost, whole = lost + error**2, whole + change.square().sum().item()
    assert result.error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    assert result.error < 1e-6 if rank == 9 else result.error > 0.1
    for key, value in adapter.state.items():
        if "magnitude" in key:
            assert torch.equal(result.adapter.state[key], value)


def test_a_rank_raised_and_lowered_again_is_the_adapter(tmp_path):
    adapter = random_adapter(PATTERNED)
    again = full(resize(resize(adapter, 12).adapter, 5).adapter)
    assert all(relative_error(again[path], change) < 1e-6 for path, change in full(adapter).items())
    zero = AdapterFile(CONFIG, {k: v * 0 for k, v in random_adapter(CONFIG).state.items()})
    assert resize(zero, 2).error == 0 and all(torch.isfinite(v).all() for v in resize(zero, 2).adapter.state.values())
    with pytest.raises(ValueError, match="rank is 0"):
        resize(adapter, 0)


def test_an_average_is_the_weighted_sum_of_changes(midi_golden):
    """Not of factors: two adapters that differ by a permutation of their rank do the same, as their average does."""
    one, two = random_adapter(SETTINGS["rslora"], 1), random_adapter(replace(PATTERNED, rank=5, rank_pattern={}), 2)
    mixed = average([one, two], [0.7, -0.4])
    a, b, c = full(one), full(two), full(mixed)
    assert c.keys() == a.keys() | b.keys()
    for path, change in c.items():
        assert relative_error(change, 0.7 * a.get(path, 0) - 0.4 * b.get(path, 0)) < 1e-6, path
    order = torch.randperm(4)
    permuted = {k: v[order] if "_A" in k else v[:, order] for k, v in one.state.items()}
    same = average([one, AdapterFile(one.config, permuted)])
    assert all(relative_error(change, a[path]) < 1e-6 for path, change in full(same).items())
    assert set(ranks_of(same.state).values()) == {8} and resize(same, 4).error < 1e-6
    g, model = midi_golden, golden_dit("midi_tiny")
    outputs = []
    for parts in ({"one": one, "two": two}, {"mixed": mixed}):
        for name, adapter in parts.items():
            apply_adapter(model, adapter, name)
        lora.set_adapters(model, {"one": 0.7, "two": -0.4} if "one" in parts else {"mixed": 1.0})
        with torch.no_grad():
            outputs.append(model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"]))
        lora.remove_adapters(model)
    assert relative_error(outputs[1], outputs[0]) < 1e-5


def test_averages_that_make_no_sense_are_refused_or_warned_of(midi_dit, triposg_dit):
    one = random_adapter(CONFIG)
    with pytest.raises(ValueError, match="a DoRA changes every weight by more than a low rank"):
        average([one, random_adapter(SETTINGS["dora"])])
    for weights in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="give one finite weight for each"):
            average([one, one], weights)
    key = "blocks.0.attn1.to_q.lora_A.weight"
    with pytest.raises(ValueError, match="blocks.0.attn1.to_q: the adapters are made for different widths"):
        average([one, AdapterFile(CONFIG, {**one.state, key: torch.zeros(4, 32)})])
    told = [replace(one, metadata=describe(model, {"steps": 1}, "tiny")) for model in (midi_dit, midi_dit, triposg_dit)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = average(told[:2]).metadata
    assert facts["base_fingerprint"] == told[0].metadata["base_fingerprint"]
    assert facts["training"]["average_of"][0] == {"weight": 0.5, "training": {"steps": 1}}
    with pytest.warns(UserWarning, match="trained on different bases"):
        mixed = average(told[1:])
    assert "base_model" not in mixed.metadata
    with pytest.warns(UserWarning, match="trained on another base: it may not do what it did"):
        apply_adapter(midi_dit, mixed, "mixed")
    lora.remove_adapters(midi_dit)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is(tmp_path, command, capsys, midi_dit):
    adapter = replace(random_adapter(PATTERNED), metadata=describe(midi_dit, {"steps": 7, "loss": 0.25}, "MIDI-3D"))
    write_adapter(tmp_path / "sofas", adapter)
    assert command(["inspect", str(tmp_path / "sofas")]) == 0
    said = capsys.readouterr().out
    for text in ("format: peft, LoRA", "2 skip_linear", "5 attn1.to_q", "steps 7, loss 0.25", "base_model: MIDI-3D",
                 "multi_instance_blocks: [1, 2, 3]", "rank: 3 ("):  # fmt: skip
        assert text in said
    total = sum(v**2 for v in change_norms(adapter).values()) ** 0.5
    assert f"{total:.4g} in all" in said and "blocks.4: " in said
    with Image.open(tmp_path / "sofas.norms.png") as chart:
        assert chart.width == 900 and chart.height > 20 * len(block_norms(change_norms(adapter)))
    save_file(load_file(MIDI / "lora" / "peft_state_dict.safetensors"), tmp_path / "bare.safetensors")
    assert command(["inspect", str(tmp_path / "bare.safetensors"), "--chart", str(tmp_path / "c" / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "note: alpha is not in the file" in said and (tmp_path / "c" / "x.png").is_file()
    assert "DoRA, rsLoRA" in report(random_adapter(SETTINGS["dora, rslora and patterns"]), "x")


def test_the_bars_are_as_long_as_the_numbers():
    from midilite.render.charts import COLORS, bar_chart

    chart = bar_chart({"a": 1.0, "some longer name": 4.0, "zero": 0.0}, "title")
    pixels = chart.load()  # a bar's ends are blended with the background, hence the tolerance
    lengths = [sum(pixels[x, 50 + 20 * i] == COLORS[0] for x in range(chart.width)) for i in range(3)]
    assert lengths[1] / lengths[0] == pytest.approx(4, rel=0.05) and lengths[2] <= 2 and lengths[1] > 500
    for wrong in ({}, {"a": float("nan")}, {"a": -1.0}):
        with pytest.raises(ValueError, match="bars need finite values"):
            bar_chart(wrong)


@pytest.mark.parametrize("kind", ["patterns", "dora"])
def test_convert_writes_every_format(tmp_path, command, kind):
    adapter = random_adapter(SETTINGS[kind])
    write_adapter(tmp_path / "a", adapter)
    chain = [("k.safetensors", "kohya"), ("d.safetensors", None), ("s.pth", None), ("x.safetensors", "state_dict")]
    source = tmp_path / "a"
    for name, format in [*chain, ("folder", None)]:
        extra = ["--format", format] if format else []
        assert command(["convert", str(source), str(tmp_path / name), *extra]) == 0
        source = tmp_path / name
        read = read_adapter(source)
        assert_same(read, adapter)
        expected = {"d.safetensors": "diffusers", "s.pth": "state_dict", "folder": "peft"}
        assert read.format == (format or expected[name])


def test_resize_and_average_from_the_command_line(tmp_path, command, capsys):
    for i in (1, 2):
        write_adapter(tmp_path / str(i), random_adapter(CONFIG, i))
    out = tmp_path / "small.safetensors"
    assert command(["resize", str(tmp_path / "1"), str(out), "--rank", "2"]) == 0
    said, result = capsys.readouterr().out, resize(random_adapter(CONFIG, 1), 2)
    assert f"all 60 modules together: relative error {result.error:.3g}; the largest:" in said
    worst = max(result.errors, key=result.errors.get)
    assert said.count("\n") < 12 and f"  {worst}: {result.errors[worst]:.3g}\n" in said
    assert_same(read_adapter(out), result.adapter)
    files = [str(tmp_path / name) for name in ("1", "2", "both")]
    assert command(["average", *files, "--weights", "0.25", "0.75"]) == 0
    both, expected = full(read_adapter(tmp_path / "both")), [full(random_adapter(CONFIG, i)) for i in (1, 2)]
    assert all(relative_error(v, 0.25 * expected[0][k] + 0.75 * expected[1][k]) < 1e-6 for k, v in both.items())
    assert command(["average", *files[:2], str(tmp_path / "b.pth"), "--rank", "3"]) == 0
    assert read_adapter(tmp_path / "b.pth").config.rank == 3


def test_errors_are_one_line(tmp_path, command, capsys):
    assert command(["inspect", str(tmp_path / "absent")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("adapter.py: error: ") and "no such file" in said and said.count("\n") == 1
    for wrong in (["average", "a", "b"], ["resize", "a", "b"], ["convert", "a", "b", "--format", "onnx"], []):
        with pytest.raises(SystemExit) as error:
            command(wrong)
        assert error.value.code == 2


# --- with a model -----------------------------------------------------------------------------------------------------


def half_checkpoint(folder):
    """The golden model with its transformer stored in bf16, the rest in fp32."""
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device="cpu")
    pipe.transformer.bfloat16()
    pipe.save(folder)
    return folder


@pytest.mark.parametrize("kinds", [("lora",), ("dora", "patterns")], ids=str)
def test_merge_writes_a_checkpoint_folder_with_one_rounding(tmp_path, command, kinds):
    model = half_checkpoint(tmp_path / "model")
    paths = []
    for i, kind in enumerate(kinds):
        write_adapter(tmp_path / kind, random_adapter(SETTINGS[kind], i))
        paths.append(str(tmp_path / kind))
    arguments = ["--pretrained_model", str(model), "--lora_path", *paths, "--lora_scale", "0.5"]
    assert command(["merge", *arguments, "--output", str(tmp_path / "merged")]) == 0
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    before, after = load_file(model / file), load_file(tmp_path / "merged" / file)
    exact = midilite.load_pipeline(model, device="cpu", dtype=torch.float32)
    for path in paths:
        exact.load_adapter(path, 0.5, name=Path(path).name)
    exact.merge_adapters()
    for key, value in exact.transformer.state_dict().items():
        assert after[key].dtype is torch.bfloat16 and torch.equal(after[key], value.bfloat16())
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    for part, name in (("vae", "diffusion_pytorch_model"), ("image_encoder_1", "model"), ("image_encoder_2", "model")):
        own, kept = (load_file(folder / part / f"{name}.safetensors") for folder in (model, tmp_path / "merged"))
        assert all(kept[key].dtype is torch.float32 and torch.equal(kept[key], own[key]) for key in own)
    assert command(["merge", *arguments, "--output", str(tmp_path / "merged")]) == 1  # it is not empty any more
    assert json.loads((tmp_path / "merged" / "model_index.json").read_text())["_class_name"] == "MIDIPipeline"


def test_sweep_shows_one_scene_at_every_strength(tmp_path, command, capsys):
    write_adapter(tmp_path / "a", random_adapter(CONFIG))
    out = tmp_path / "new" / "sweep.png"
    arguments = ["--pretrained_model", str(MIDI / "checkpoint"), "--lora_path", str(tmp_path / "a"), "--device", "cpu"]
    arguments += ["--rgb_image", str(MIDI / "scene_rgb.png"), "--seg_image", str(MIDI / "scene_seg.png")]
    arguments += ["--num_inference_steps", "2", "--num_tokens", "8", "--grid_depth", "4", "--output", str(out)]
    assert command(["sweep", *arguments, "--scales", "0", "1"]) == 0
    said = capsys.readouterr().out
    assert "scale 0: " in said and "scale 1: " in said
    with Image.open(out) as sheet:
        assert sheet.width > 2.9 * 256 and sheet.height > 2 * 256
    with pytest.raises(SystemExit, match="2"):
        command(["sweep", *arguments, "--lora_scale", "1", "2", "--scales", "0"])
    assert "1 adapters but 2 scales" in capsys.readouterr().err


def test_sweep_samples_as_the_model_says(tmp_path, command, monkeypatch):
    """Past bug: 50 steps, guidance 7 and depth 7 of its own, whatever the model said."""
    model, asked = tmp_path / "model", []
    shutil.copytree(MIDI / "checkpoint", model)
    index = json.loads((model / "model_index.json").read_text())
    own = {"num_inference_steps": 3, "guidance_scale": 1.5, "grid_depth": 4, "solver": "ab2"}
    (model / "model_index.json").write_text(json.dumps(index | {SAMPLING_KEY: own}))
    write_adapter(tmp_path / "a", random_adapter(CONFIG))
    original, decode = pipeline.sample, adapter_work.decode_meshes

    def sample(transformer, scheduler, conditions, latents, sampling, *more):
        asked.append(sampling)
        return original(transformer, scheduler, conditions, latents, sampling, *more)

    monkeypatch.setattr(pipeline, "sample", sample)
    monkeypatch.setattr(adapter_work, "decode_meshes", lambda *a: asked.append(a[3]) or decode(*a))
    given = ["--pretrained_model", str(model), "--lora_path", str(tmp_path / "a"), "--device", "cpu", "--scales", "1"]
    given += ["--rgb_image", str(MIDI / "scene_rgb.png"), "--seg_image", str(MIDI / "scene_seg.png")]
    assert command(["sweep", *given, "--num_tokens", "8", "--output", str(tmp_path / "s.png")]) == 0
    assert asked == [Sampling(**own), 4]
    more = ["--num_inference_steps", "2", "--solver", "euler", "--guidance_interval", "0.1", "0.9", "--grid_depth", "3"]
    assert command(["sweep", *given, *more, "--num_tokens", "8", "--output", str(tmp_path / "s.png")]) == 0
    assert asked[2:] == [Sampling(2, 1.5, 4, "euler", (0.1, 0.9)), 3], "meshes have the depth asked for"


# --- what was met -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_a_folder_is_not_called_like_a_file(tmp_path, command, capsys, name):
    """Past bug: `--format peft` made a folder of the name out.safetensors."""
    write_adapter(tmp_path / "a", random_adapter(CONFIG))
    given = [str(tmp_path / "a"), str(tmp_path / name), "--format", "peft"]
    for arguments in (["convert", *given], ["resize", *given, "--rank", "2"]):
        assert command(arguments) == 1
        said = capsys.readouterr()
        assert (
            "the format peft is a folder, which should not be called like a file" in said.err
            and "error" not in said.out
        )
    assert not (tmp_path / name).exists()


def test_inspect_shows_the_hash_of_a_fingerprint_and_bounds_every_fact(tmp_path):
    print_ = "4aa40e888ef833cd-" + "A" * 172
    facts = {"base_fingerprint": print_, "training": {"base_fingerprint": [print_] * 9, "note": "x" * 3000}}
    text = report(replace(random_adapter(CONFIG), metadata=facts), "a")
    assert "base_fingerprint: 4aa40e888ef833cd\n" in text and "AAAA" not in text
    assert max(map(len, text.splitlines())) < 500


def test_a_rank_above_the_adapters_is_told(tmp_path, command, capsys):
    adapter = random_adapter(replace(CONFIG, rank=4))
    write_adapter(tmp_path / "a", adapter)
    for rank, told in ((4, False), (9, True)):
        assert command(["resize", str(tmp_path / "a"), str(tmp_path / f"b{rank}"), "--rank", str(rank)]) == 0
        assert (f"note: rank {rank} is more than the adapter's 4" in capsys.readouterr().out) == told

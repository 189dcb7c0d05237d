"""Resizing with ranks shared out among modules: what it keeps, what it may cost, and that files express it.

That peft and diffusers load the result to the same output is in `test_adapter_interchange.py`.
"""

from dataclasses import replace

import pytest
import torch
from adapter_samples import CONFIG, WIDE, assert_same, random_adapter, uneven_adapter
from golden_files import golden_dit, relative_error

from midilite import lora
from midilite.commands.adapter import report
from midilite.commands.launch import command
from midilite.lora.arithmetic import resize
from midilite.lora.files import AdapterFile, apply_adapter, read_adapter, write_adapter
from midilite.lora.peft_config import exact_config
from midilite.lora.tensors import range_text, ranks_of


def diagonal(modules):
    """An adapter of scale 1 from {path: (in, out, singular values)}: diagonal factors, so the values are exact."""
    state = {}
    for path, (inside, outside, values) in modules.items():
        state[f"{path}.lora_A.weight"] = torch.eye(len(values), inside)
        state[f"{path}.lora_B.weight"] = torch.eye(outside, len(values)) * torch.tensor(values)
    ranks = ranks_of(state)
    return AdapterFile(exact_config(ranks, ranks), state)


def numbers(adapter):
    return sum(value.numel() for key, value in adapter.state.items() if "magnitude" not in key)


@pytest.mark.parametrize(
    "config", [WIDE, replace(WIDE, use_rslora=True, use_dora=True), CONFIG], ids=["patterns", "dora, rslora", "lora"]
)
@pytest.mark.parametrize("rank", range(1, 8))
def test_it_costs_no_more_and_loses_no_more_than_one_rank_for_all(config, rank):
    """Oracle: the decomposition of every full matrix, cut to the module's new rank."""
    adapter = uneven_adapter(config)
    shared, uniform = resize(adapter, rank, share_ranks=True), resize(adapter, rank)
    assert numbers(shared.adapter) <= numbers(uniform.adapter)
    assert shared.error <= uniform.error + 1e-12
    old, new = ranks_of(adapter.state), ranks_of(shared.adapter.state)
    assert all(1 <= new[path] <= old[path] for path in old) and list(new) == list(old)
    lost = whole = 0.0
    for path, count in new.items():
        scale = adapter.config.scale_of(path)
        assert shared.adapter.config.scale_of(path) == pytest.approx(scale, rel=1e-12)
        before, after = (
            file.state[f"{path}.lora_B.weight"].double() @ file.state[f"{path}.lora_A.weight"].double()
            for file in (adapter, shared.adapter)
        )
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        assert relative_error(after, (u[:, :count] * s[:count]) @ vh[:count]) < 1e-5, path
        lost += (scale * (before - after)).square().sum().item()
        whole += (scale * before).square().sum().item()
    assert shared.error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    if config.use_dora:
        assert all(torch.equal(shared.adapter.state[k], v) for k, v in adapter.state.items() if "magnitude" in k)


def test_modules_that_differ_share_well():
    adapter = uneven_adapter()
    shared, uniform = resize(adapter, 3, share_ranks=True), resize(adapter, 3)
    assert shared.error < 0.8 * uniform.error and len(set(ranks_of(shared.adapter.state).values())) > 3


@pytest.mark.parametrize("rank", [6, 50])
def test_the_full_rank_is_exact_and_nothing_is_added(rank):
    adapter = uneven_adapter()
    result = resize(adapter, rank, share_ranks=True)
    assert result.error == 0 and ranks_of(result.adapter.state) == ranks_of(adapter.state)


def test_energy_per_number_decides():
    """By hand: 10 and 20 numbers a rank. Beside rank 1 each, the budget of rank 2 leaves 30 numbers."""
    modules = {"narrow": (4, 6, [9.0, 3, 2, 1]), "wide": (8, 12, [9.0, 4, 0.5, 0.25])}
    found = resize(diagonal(modules), 2, share_ranks=True)  # 9/10 > 16/20, and then nothing is left
    assert ranks_of(found.adapter.state) == {"narrow": 2, "wide": 2}
    modules["narrow"] = (4, 6, [9.0, 3, 2.9, 2.8])  # 8.41/10 > 16/20, and 8.41 + 7.84 > 16
    assert ranks_of(resize(diagonal(modules), 2, share_ranks=True).adapter.state) == {"narrow": 4, "wide": 1}
    modules["narrow"] = (4, 6, [9.0, 3, 2, 1])
    modules["wide"] = (8, 12, [9.0, 1.4, 0.5, 0.25])  # 9/10 > 4/10 > 1/10 > 1.96/20
    found = resize(diagonal(modules), 2, share_ranks=True)
    assert ranks_of(found.adapter.state) == {"narrow": 4, "wide": 1}
    assert found.error == pytest.approx(((1.96 + 0.25 + 0.0625) / (81 + 9 + 4 + 1 + 81 + 1.96 + 0.3125)) ** 0.5)


def test_the_scale_counts():
    adapter = diagonal({"a": (6, 6, [2.0, 1, 1]), "b": (6, 6, [2.0, 1, 1])})
    scaled = replace(adapter, config=exact_config({"a": 3, "b": 3}, {"a": 3.0, "b": 30.0}))
    assert ranks_of(resize(scaled, 2, share_ranks=True).adapter.state) == {"a": 1, "b": 3}


def test_a_wide_module_that_no_longer_fits_is_no_loss():
    """By energy per number the third rank of `narrow` precedes the second of `wide`, which then doesn't fit."""
    modules = {"narrow": (4, 6, [4.0, 1, 0.995]), "wide": (40, 60, [4.0, 3, 0.0])}
    shared, uniform = (resize(diagonal(modules), 2, share_ranks=share) for share in (True, False))
    assert ranks_of(shared.adapter.state) == {"narrow": 2, "wide": 2} and shared.error == uniform.error


def test_ties_do_not_hang_on_the_order_of_the_file():
    modules = {name: (6, 6, [2.0, 1, 1]) for name in ("c", "a", "b")}
    backwards = dict(reversed(modules.items()))
    found = [ranks_of(resize(diagonal(m), 2, share_ranks=True).adapter.state) for m in (modules, backwards)]
    assert found[0] == found[1] == {"a": 2, "b": 2, "c": 2}
    adapter = uneven_adapter()
    first, second = (resize(adapter, 3, share_ranks=True).adapter.state for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_modules_that_change_nothing_keep_one_rank():
    found = resize(diagonal({"a": (4, 4, [0.0, 0]), "b": (4, 4, [1.0, 1])}), 2, share_ranks=True)
    assert ranks_of(found.adapter.state) == {"a": 1, "b": 2} and found.error == 0
    assert all(torch.isfinite(value).all() for value in found.adapter.state.values())
    with pytest.raises(ValueError, match="rank is 0"):
        resize(random_adapter(CONFIG), 0, share_ranks=True)


# --- files, programs, models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=str)
def test_every_format_keeps_the_ranks(tmp_path, kind):
    adapter, main = uneven_adapter(replace(WIDE, **kind)), command("adapter")
    write_adapter(tmp_path / "whole", adapter)
    assert main(["resize", str(tmp_path / "whole"), str(tmp_path / "a"), "--rank", "3", "--share_ranks"]) == 0
    expected = resize(adapter, 3, share_ranks=True).adapter
    assert_same(read_adapter(tmp_path / "a"), expected)
    source = tmp_path / "a"
    for name, format in [("k.safetensors", "kohya"), ("d.safetensors", "diffusers"), ("s.pth", "state_dict"),
                         ("k2.safetensors", "kohya"), ("folder", "peft")]:  # fmt: skip
        assert main(["convert", str(source), str(tmp_path / name), "--format", format]) == 0
        source = tmp_path / name
        assert_same(read_adapter(source), expected)


def test_files_that_hold_no_settings_of_ours_keep_the_scales(tmp_path):
    """Kohya's alphas as another program would have written them, in fp32 and without our header."""
    from safetensors.torch import load_file, save_file

    expected = resize(uneven_adapter(), 3, share_ranks=True).adapter
    write_adapter(tmp_path / "k.safetensors", expected, "kohya")
    save_file(load_file(tmp_path / "k.safetensors"), tmp_path / "bare.safetensors")
    read = read_adapter(tmp_path / "bare.safetensors")
    assert ranks_of(read.state) == ranks_of(expected.state)
    for path in ranks_of(read.state):
        assert read.config.scale_of(path) == pytest.approx(expected.config.scale_of(path), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=str)
def test_merged_and_beside_the_base_it_does_the_same(midi_golden, kind):
    """And at full rank what the adapter did before."""
    g, adapter = midi_golden, uneven_adapter(replace(WIDE, **kind))
    outputs = {}
    for name, file in (("before", adapter), *((rank, resize(adapter, rank, True).adapter) for rank in (3, 6))):
        model = golden_dit("midi_tiny")
        apply_adapter(model, file)
        outputs[name] = model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])
        lora.merge_adapters(model)
        assert relative_error(model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"]), outputs[name]) < 1e-5
    assert relative_error(outputs[6], outputs["before"]) < 1e-5 < relative_error(outputs[3], outputs["before"])


def test_inspect_tells_a_range(tmp_path, capsys):
    adapter = resize(uneven_adapter(), 4, share_ranks=True).adapter
    ranks = list(ranks_of(adapter.state).values())
    assert (min(ranks), max(ranks)) == (1, 6)
    assert f"rank: 1 to 6 ({len(set(ranks))} values in {len(ranks)} modules); alpha: " in report(adapter, "a")
    tenth = exact_config(ranks_of(adapter.state), {p: 0.1 * rank for p, rank in ranks_of(adapter.state).items()})
    assert report(replace(adapter, config=tenth), "a").splitlines()[4].endswith("; scale: 0.1"), "one, but for rounding"
    assert range_text([8, 8]) == "8" and range_text([32, 1, 4]) == "1 to 32"
    write_adapter(tmp_path / "a", adapter)
    arguments = ["resize", str(tmp_path / "a"), str(tmp_path / "b"), "--rank", "2", "--share_ranks"]
    assert command("adapter")(arguments) == 0
    smaller = ranks_of(read_adapter(tmp_path / "b").state).values()
    assert f"rank {range_text(smaller)}\nall {len(ranks)} modules together: relative error" in capsys.readouterr().out
    assert command("adapter")([*arguments[:2], str(tmp_path / "c"), "--rank", "9", "--share_ranks"]) == 0
    assert "it does the same as before, nothing is added" in capsys.readouterr().out

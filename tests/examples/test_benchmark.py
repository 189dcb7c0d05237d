"""The benchmark in its CPU form: every kind of row runs small, and one that fails does not take the others along."""

import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch
from benchmarks import bench, command, kernels, models, report
from benchmarks.cases import scaling, scene

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture
def measured(tmp_path, capsys):
    """measured(*words) -> rows by name, and the last line of a run."""

    def run(*words: str) -> tuple[dict[str, dict], dict]:
        output = tmp_path / "rows.jsonl"
        assert command.main([*QUICK, "--folder", str(tmp_path), "--output", str(output), *words]) == 0
        *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
        kept = [json.loads(line) for line in output.read_text().splitlines()][-len(lines) :]
        assert [{k: v for k, v in line.items() if k != "machine"} for line in kept] == lines
        return {line["row"]: line for line in lines}, last

    return run


def test_steps_are_timed_and_counted(measured):
    rows, last = measured(
        "--rows", "step 1 eager", "step 4 int8", "train 1 checkpointed eager", "train 5+3 plain eager"
    )
    assert len(rows) == 4 and not last["failed"] and last["roof_tflops"] > 0
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and 0 < row["share_of_roof"] < 2
        assert row["tflops"] == pytest.approx(1000 * row["tflop"] / row["median_ms"], rel=2e-3)
    assert 0 < rows["step 4 int8"]["notes"]["error_int8"]["velocity"] < 0.1
    assert rows["step 4 int8"]["notes"]["error_plain"]["velocity"] < 1e-5


def test_profiled_rows_say_what_their_time_goes_into(measured):
    """Products and attention are most of a step whatever it runs on, and the parts don't exceed the whole by much."""
    rows, _ = measured("--profile", "--rows", "step 4 eager", "train 1 checkpointed eager")
    for row in rows.values():
        parts = row["notes"]["kernels_ms"]
        assert {"products", "attention", "gelu"} < set(parts) and list(parts.values()) == sorted(parts.values())[::-1]
        assert parts["products"] > 0.2 * sum(parts.values()) and sum(parts.values()) < 4 * row["median_ms"]


def test_kernels_are_told_by_their_names():
    """Names as an H100 reports them."""
    times = {
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopB_TNT": 3.0,
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel>>": 1.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_kernel0_0": 2.0,
        "_keys_kernel": 0.5,
        "triton_poi_fused_gelu_view_3": 0.25,
        "triton_red_fused__scaled_mm_cudnn_attention_native_layer_norm_1": 0.125,
        "Memcpy DtoD (Device -> Device)": 0.0625,
        "void at::native::unknown": 0.03125,
    }
    assert kernels.by_kind(times.items()) == {
        "products": 4.0, "attention": 2.5, "gelu": 0.25, "norms, sums and other fused work": 0.125, "copies": 0.0625,
        "others": 0.03125,
    }  # fmt: skip


def test_whole_works(measured, monkeypatch):
    monkeypatch.setattr(scene, "FAST", ((4, 1),))  # of the rows with a speed adapter the shortest
    rows, last = measured("--rows", "mesh chair", "mesh ball", "scene", "load", "scaling rank")
    assert not last["failed"]
    assert all(rows[f"mesh {shape}"]["notes"]["points"] > 1000 for shape in ("chair", "ball"))
    for name in ("scene", "scene fast 4 steps 1 object"):
        parts = rows[name]["notes"]["parts_ms"]
        assert list(parts) == ["encode", "denoise", "decode", "write"] and min(parts.values()) > 0
    load = rows["load"]["notes"]
    assert {"disk cold", "load cold", "disk warm", "load warm"} == set(load["gib_per_second"])
    assert rows["scaling rank"]["notes"]["plot"] == "scaling_rank.png"


def test_surfaces_and_preparation_have_rows(measured):
    rows, last = measured("--rows", "triangulate", "extract", "prepare")
    assert not last["failed"] and len(rows) == 7 and all(row["median_ms"] > 0 for row in rows.values())
    for shape in ("ball", "chair"):
        notes = rows[f"extract {shape}"]["notes"]
        assert notes["points"] <= notes["dense_points"] and notes["triangles"] > 50


def test_shortcuts_are_exact(measured):
    """All that a CPU can tell: batched, recomputed, handed out and offloaded against every shortcut off."""
    rows, last = measured("--rows", "exact")
    assert not last["failed"] and len(rows) == 4
    assert all(row["notes"]["holds"] is True for row in rows.values()), rows
    assert set(rows["exact fp32 gradients"]["notes"]) >= {
        "batched",
        "checkpointed",
        "selective",
        "graph",
        "offload checkpointed",
    }


def test_processes_of_their_own(measured, tmp_path):
    """A preset in its memory, and steps of two checkouts by turns, each importing its own midilite."""
    before = tmp_path / "before"
    before.mkdir()
    (before / "midilite").symlink_to(ROOT / "midilite")
    rows, last = measured("--rows", "memory 6gb", "cpu train", "--against", str(before))
    assert not last["failed"]
    assert rows["memory 6gb infer"]["notes"]["parts_rest"] is True and rows["memory 6gb infer"]["median_ms"] > 0
    assert rows["memory 6gb train"]["notes"]["base"] == "int8" and rows["memory 6gb train"]["median_ms"] > 0
    assert 0.1 < rows["cpu train"]["notes"]["before_to_now"] < 10


def test_a_failing_row_leaves_the_others(tmp_path):
    """What went wrong is the row's result; objects shared with it are forgotten, so that their memory is free."""
    here = bench.Bench(torch.device("cpu"), models.tiny(), torch.float32, True, tmp_path)
    closed = []

    class Thing:
        close = staticmethod(lambda: closed.append(True))

    def broken(bench, row):
        bench.shared("thing", Thing)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def fine(bench, row):
        row.notes["shared"] = bench.shared("thing", lambda: "new")

    cases = [bench.Case("a", broken), bench.Case("b", fine), bench.Case("long", fine, seconds=1e9)]
    rows = []
    assert bench.run_all(cases, here, 100.0, rows.append) == ["long"]
    assert rows[0].error == "out of memory: CUDA out of memory. Tried to allocate" and closed == [True]
    assert rows[1].error is None and rows[1].notes["shared"] == "new"


def test_what_rows_shared_is_gone_when_the_next_is_made(tmp_path):
    """A trainer is part of cycles, and the next row must not pay for its memory."""

    class Thing:
        def __init__(self):
            self.itself = self

    kept = bench.Bench.start(torch.device("cpu"), models.SIZES["tiny"](), True, tmp_path)
    alive = weakref.ref(kept.shared("first", Thing))
    kept.shared("second", lambda: [alive() is None])
    assert kept.shared("second", Thing) == [True]


def test_rows_are_chosen_by_whole_words(capsys):
    """`step 1` is not `step 16`; an unknown word is an error that lists the rows."""
    cases = {name: bench.Case(name, print, usual=name != "rare") for name in ("step 1 eager", "step 16 eager", "rare")}
    assert [case.name for case in bench.choose(cases, ["step 1", "rare"])] == ["step 1 eager", "rare"]
    assert [case.name for case in bench.choose(cases, None)] == ["step 1 eager", "step 16 eager"]
    assert command.main(["--rows", "stop"]) == 2
    assert "'stop': no such row" in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    listed = {line.rsplit(maxsplit=2)[0] for line in capsys.readouterr().out.splitlines()}
    assert {"step 4 compiled", "train 5+3 plain compiled", "mesh chair", "scene", "load"} <= set(report.GOALS)
    assert {name for name in report.GOALS if not name.startswith("train")} <= listed


def test_rows_become_a_table(tmp_path, capsys):
    """A row measured twice counts as measured last; what is not finite is no number."""
    path = tmp_path / "rows.jsonl"
    first, again = report.Row("scene", median_ms=1e4), report.Row("scene", median_ms=5e3, notes={"x": float("nan")})
    path.write_text("".join(f"{row.to_json()}\n" for row in (first, report.Row("mesh", error="no | luck"), again)))
    assert command.main(["--markdown", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| mesh | - |") and "failed: no / luck" in lines[2]
    assert "| 5000 ms |" in lines[3] and "| 22 s | 5.5 s | x None |" in lines[3]
    path.write_text("{")
    assert command.main(["--markdown", str(path)]) == 2


def test_the_slope_is_that_of_the_last_points():
    """Cubic growth after a constant start, as of a grid whose first points are all overhead."""
    assert scaling.log_slope({1: 8.0, 2: 8.0, 4: 64.0, 8: 512.0}) == pytest.approx(3.0)


def test_random_weights_make_a_ball():
    """Or nothing of the mesh rows would mean anything: one closed surface of the size that was meant, in any type."""
    from midilite.inference.decoding import decode_meshes

    size = models.tiny()
    for dtype in (torch.float32, torch.bfloat16):
        vae = models.random_vae(size, torch.device("cpu"), dtype)
        with torch.no_grad():
            (mesh,) = decode_meshes(vae, models.random_latents(size, 1, torch.device("cpu")), [1], 4)
        radius = torch.from_numpy(mesh.vertices).norm(dim=1)
        assert mesh.is_watertight and 0.8 < radius.min() and radius.max() < 1.0


def test_the_command_finds_its_package():
    """As `python examples/benchmarks/run.py` does, whose folder is on the path."""
    specification = importlib.util.spec_from_file_location("benchmark", ROOT / "examples" / "benchmarks/run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.main is command.main

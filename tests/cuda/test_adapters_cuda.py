"""The promises about adapters on a GPU, where other kernels run: exact starts, merging, and a base that never changes.

The shipped model is used: at its widths a GPU's matrix products do take their fast paths.
"""

import dataclasses
import json

import pytest
import torch
from adapter_kinds import KINDS
from golden_files import GOLDEN, relative_error

import midilite
from midilite import lora
from midilite.commands.train import train_lora
from midilite.lora.files import AdapterFile, apply_adapter, read_adapter, write_adapter
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA GPU; test_lora_kinds.py is the same on a CPU"
)

DTYPES = [torch.float32, torch.bfloat16]


def load(dtype):
    return ModelFolder("tiny").load_transformer("cuda", dtype)


@torch.no_grad()
def run(model):
    """A batch of two scenes, of three instances and of one."""
    generator = torch.Generator().manual_seed(0)
    clip, dinov2 = model.config.cross_attention_dim, model.config.cross_attention_2_dim
    shapes = (4, 64, model.config.in_channels), (4, 1, clip), (4, 50, dinov2)
    x, first, second = (torch.randn(shape, generator=generator).to("cuda", model.dtype) for shape in shapes)
    times = torch.tensor([900.0, 900.0, 900.0, 100.0], device="cuda")
    return model(x, times, first, second, groups=[3, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind, dtype):
    """For PiSSA this says, too, that what it adds at its start is zero, not small."""
    model = load(dtype)
    before = run(model)
    lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=("*",), dropout=0.5))
    assert torch.equal(run(model), before)
    model.train()
    assert torch.equal(run(model), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_delta_is_zero(kind):
    model = load(torch.bfloat16)
    lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=("*",)))
    for linear in {linear for linear, _ in lora.named_linears(model).values()}:
        assert not linear.adapter.adapters["default"].delta(linear).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind, dtype):
    """fp32 (without TF32): rounding only. bf16: no worse than a few times what rounding the base to bf16 does."""
    exact, found = {}, {}
    for merged in (False, True):
        for precision, results in ((torch.float32, exact), (dtype, found)):
            model = load(torch.bfloat16).to(precision)  # one base: PiSSA starts from its bits
            lora.inject(model, dataclasses.replace(KINDS[kind], target_modules=("*",)))
            scramble(model)
            if merged:
                lora.merge_adapters(model)
            results[merged] = run(model).float()
    base = run(load(torch.bfloat16).float())
    assert relative_error(exact[True], exact[False]) < 5e-5 < relative_error(exact[False], base) / 100
    rounding = relative_error(run(load(torch.bfloat16)).float(), base)
    limit = 5e-5 if dtype == torch.float32 else 3 * rounding
    assert all(relative_error(found[merged], exact[False]) < limit for merged in (False, True))


def scramble(model, size=0.02):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_100_cycles_of_loading_and_unloading_leave_the_bases_bits(tmp_path, dtype):
    """Loading, using, changing weights, switching and unloading never write to the base."""
    model = load(dtype)
    before, output = {key: value.clone() for key, value in model.state_dict().items()}, run(model)
    config = KINDS["dora"]
    lora.inject(model, config)
    scramble(model)
    write_adapter(tmp_path / "a", AdapterFile(config, lora.adapter_state(model)))
    lora.remove_adapters(model)
    adapter = read_adapter(tmp_path / "a")
    for cycle in range(100):
        apply_adapter(model, adapter, "a")
        apply_adapter(model, adapter, "b")
        lora.set_adapters(model, {"a": cycle / 100, "b": 0.5})
        if cycle % 25 == 0:
            assert not torch.equal(run(model), output)
        lora.remove_adapters(model)
    assert torch.equal(run(model), output)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_image_encoders_train_on_a_gpu_as_on_a_cpu(prepared, tmp_path, precision):
    """Losses of six steps with pixels read ahead and blocks recomputed; the file loads into a pipeline there."""
    folders = {}
    for device in ("cpu", "cuda"):
        options = TrainOptions(
            pretrained_model=str(GOLDEN / "midi_tiny" / "checkpoint"), data_dir=str(prepared), device=device,
            output_dir=str(tmp_path / device), cache_dir=str(tmp_path / "cache"), num_tokens=16, lora_rank=4,
            learning_rate=1e-3, max_train_steps=6, batch_size=2, train_image_encoders=True, mixed_precision=precision,
            gradient_checkpointing=device == "cuda", lora_dropout=0.0,  # two devices draw other masks
        )  # fmt: skip
        folders[device] = train_lora(options)
    lines = {d: [json.loads(line)["loss"] for line in open(tmp_path / d / "metrics.jsonl")] for d in folders}
    assert lines["cuda"] == pytest.approx(lines["cpu"], rel=1e-4 if precision == "no" else 2e-2)
    pipe = midilite.load_pipeline(GOLDEN / "midi_tiny" / "checkpoint", device="cuda")
    pipe.load_adapter(folders["cuda"])
    assert all(lora.slots(network) for network in pipe.networks.values())

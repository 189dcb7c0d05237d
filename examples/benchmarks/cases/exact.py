"""Rows that measure errors: each shortcut on against all of them off, in fp32 and bf16, forward and adapter gradients.

Off means: every scene by itself, zeros as conditions in the unconditional half, keys and values projected in every
pass, CLIP's token given twice (attention to two equal keys is attention to one, but has queries and a softmax).
On means: two scenes of different sizes in one ragged batch, whose halves start as one, then what the row's notes name.
In fp32 both are the same up to 1e-5. In bf16 the fast path may be no further from fp32 than the slow one is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from midilite import lora
from midilite.model.dit import DiT
from midilite.runtime.compile import compile_blocks, uncompile_blocks
from midilite.runtime.cuda_graphs import LossGraphs, captured
from midilite.runtime.determinism import reproducible

from ..bench import Bench, Case, describe, tidy
from ..models import random_conditions, random_latents, random_transformer, shake_adapter
from ..report import Row
from .inference import relative_error
from .training import MODES

SCENES = (2, 1)
FP32_LIMIT = 1e-5  # relative error
BF16_LIMIT = 1.1  # multiple of the slow path's error: rounding falls otherwise, and a batch's gradient is rounded once
FORWARD = ("batched", "compiled", "graph", "offload")
GRADIENTS = (
    "batched",
    "checkpointed",
    "selective",
    "compiled",
    "compiled checkpointed",
    "compiled selective",
    "graph",
    "offload checkpointed",
)

Inputs = tuple[Tensor, tuple[Tensor, ...]]  # latents [n, T, C], conditions [n, S, E] each


def cases() -> Iterator[Case]:
    """The rows."""
    for precision, seconds in (("bf16", 20), ("fp32", 45)):
        yield Case(f"exact {precision} forward", partial(forward, precision=precision), seconds)
        yield Case(f"exact {precision} gradients", partial(gradients, precision=precision), 1.5 * seconds)


def adapted_transformer(bench: Bench, precision: str) -> DiT:
    """Weights that bf16 holds exactly, in either type, with an adapter."""
    transformer = random_transformer(bench.size, bench.device, torch.bfloat16)
    if precision == "fp32":
        transformer.float()
    lora.inject(transformer, lora.LoRAConfig())
    lora.freeze_base(transformer)
    shake_adapter(transformer)
    return transformer


def inputs_of(bench: Bench, precision: str) -> Inputs:
    """Of all scenes; fewer tokens in fp32, which is slow (bf16 keeps the usual number, for which programs exist)."""
    tokens = bench.size.tokens // 4 if precision == "fp32" else bench.size.tokens
    latents = random_latents(bench.size, sum(SCENES), bench.device, tokens)
    return latents, random_conditions(bench.size, sum(SCENES), bench.device, torch.bfloat16)


def _scenes(inputs: Inputs) -> Iterator[Inputs]:
    latents, conditions = inputs
    rows = [torch.arange(sum(SCENES)).split(list(SCENES))[i] for i in range(len(SCENES))]
    for part in rows:
        yield latents[part], tuple(c[part] for c in conditions)


def slow(transformer: DiT, inputs: Inputs, unconditional: bool = False) -> Tensor:
    """The velocity of all scenes with every shortcut off."""
    outputs = []
    for latents, conditions in _scenes(inputs):
        given = [c.expand(-1, 2, -1) if c.shape[1] == 1 else c for c in conditions]
        given = [torch.zeros_like(c) for c in given] if unconditional else given
        timesteps = latents.new_full((len(latents),), 500.0)
        outputs.append(transformer(latents, timesteps, *given, groups=[len(latents)]).float())
    return torch.cat(outputs)


@torch.inference_mode()
def slow_guided(transformer: DiT, inputs: Inputs) -> Tensor:
    """Both halves, the unconditional one first."""
    return torch.cat([slow(transformer, inputs, True), slow(transformer, inputs)])


@torch.inference_mode()
def fast_guided(transformer: DiT, inputs: Inputs, graph: bool = False) -> Tensor:
    """The same in one batch, with keys and values projected ahead."""
    latents, conditions = inputs
    known = transformer.project_conditions(*conditions, unconditional=len(latents))

    def velocity(x: Tensor, timestep: Tensor) -> Tensor:
        return transformer(torch.cat([x, x]), timestep, known, groups=[*SCENES, *SCENES])

    timestep = latents.new_full((1,), 500.0)
    run = captured(velocity, latents, timestep) if graph else velocity
    return run(latents, timestep).float()


def forward(bench: Bench, row: Row, precision: str) -> None:
    """Errors of the velocity."""
    inputs, expected = inputs_of(bench, precision), None
    if precision == "bf16":
        expected = _once(bench, "fp32", lambda model: slow_guided(model, inputs))
    transformer = bench.shared(f"exact {precision}", lambda: adapted_transformer(bench, precision))
    transformer.eval()
    plain = slow_guided(transformer, inputs)
    expected = plain if expected is None else expected
    _report(row, bench, transformer, FORWARD, partial(_fast_forward, inputs=inputs), plain, expected)


def _fast_forward(transformer: DiT, name: str, inputs: Inputs) -> Tensor:
    return fast_guided(transformer, inputs, graph=name == "graph")


def gradients(bench: Bench, row: Row, precision: str) -> None:
    """Errors of the adapter's gradients, all of them as one vector."""
    inputs, expected = inputs_of(bench, precision), None
    if precision == "bf16":
        expected = _once(bench, "fp32", lambda model: adapter_gradient(model, lambda: slow(model, inputs)))
    transformer = bench.shared(f"exact {precision}", lambda: adapted_transformer(bench, precision))
    plain = adapter_gradient(transformer, lambda: slow(transformer, inputs))
    expected = plain if expected is None else expected
    _report(row, bench, transformer, GRADIENTS, partial(_fast_gradient, inputs=inputs), plain, expected)


def adapter_gradient(transformer: DiT, velocity: Callable[[], Tensor]) -> Tensor:
    """The gradient of the mean square of a velocity to all adapter weights, flat."""
    with reproducible(transformer.device.type == "cuda"):  # as in training, whose programs are used again so
        return _gradient(transformer, lambda: velocity().square().mean())


def _gradient(transformer: DiT, loss: Callable[[], Tensor]) -> Tensor:
    transformer.train()
    parameters = list(lora.adapter_parameters(transformer).values())
    return _flat(torch.autograd.grad(loss(), parameters, allow_unused=True), parameters)


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """All in one vector; zeros where a parameter has no gradient."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def _fast_gradient(transformer: DiT, name: str, inputs: Inputs) -> Tensor:
    latents, conditions = inputs
    mode = next((m for m in ("checkpointed", "selective") if m in name), "plain")
    transformer.gradient_checkpointing = MODES[mode].get("gradient_checkpointing")
    given = [latents, latents.new_full((len(latents),), 500.0), *conditions]
    try:
        if name == "graph":
            return _recorded_gradient(transformer, given)
        return adapter_gradient(transformer, lambda: transformer(*given, groups=list(SCENES)).float())
    finally:
        transformer.gradient_checkpointing = False


def _recorded_gradient(transformer: DiT, given: list[Tensor]) -> Tensor:
    """By a CUDA graph, as the trainer replays it."""

    def loss_fn(groups: Sequence[int], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        losses = transformer(*inputs, groups=groups).float().square().mean(dim=(1, 2))
        return losses.mean(), losses.detach()

    parameters = list(lora.adapter_parameters(transformer).values())
    on_gpu = transformer.device.type == "cuda"
    graphs = LossGraphs(loss_fn, parameters, most=1 if on_gpu else 0)  # a CPU records nothing
    transformer.train()
    with reproducible(on_gpu):
        graphs(SCENES, given)  # at first as it is; what comes again is recorded
        graphs(SCENES, given)[0].backward()
    found = _flat([parameter.grad for parameter in parameters], parameters)
    for parameter in parameters:
        parameter.grad = None
    return found


def _once(bench: Bench, precision: str, work: Callable[[DiT], Tensor]) -> Tensor:
    """What a transformer of another precision says; it is gone afterwards."""
    bench.release()
    model = adapted_transformer(bench, precision)
    result = work(model)
    del model
    tidy(bench.device)
    return result


def _report(
    row: Row, bench: Bench, transformer: DiT, names: Sequence[str], run: Callable[..., Tensor], plain: Tensor,
    expected: Tensor,
) -> None:  # fmt: skip
    """Errors of every way into the notes, and whether all of them hold."""
    errors: dict[str, float | str] = {}
    own = relative_error(plain, expected)
    for name in names:
        if not bench.on_gpu and name.startswith("compiled"):
            continue
        try:
            _prepare(transformer, name, bench)
            errors[name] = relative_error(run(transformer, name), expected)
        except Exception as error:  # one way that fails leaves the others to be measured; the row then does not hold
            errors[name] = describe(error)
        finally:
            uncompile_blocks(transformer)
    limit = BF16_LIMIT * own if own else FP32_LIMIT
    row.notes["holds"] = all(isinstance(error, float) and error <= limit for error in errors.values())
    row.notes |= {"limit": limit, **({"slow": own} if own else {}), **errors}
    bench.release()  # what was offloaded stays so


def _prepare(transformer: DiT, name: str, bench: Bench) -> None:
    if name.startswith("compiled"):
        compile_blocks(transformer)
    if name.startswith("offload"):
        from midilite.runtime.offload import offload_blocks

        offload_blocks(transformer, bench.device)

"""What a run forgot (`--preserve`): base and adapted network on guard scenes, while it trains and at its end."""

from __future__ import annotations

from typing import Any

from .. import lora
from ..training.interfaces import RunView
from ..training.log import say
from ..training.options import TrainOptions
from .scenes import Evaluation
from .validation import Validation, mean

_SHOWN = ("scene_f_score", "bounding_box_iou")


class Forgetting:
    """The validation loss of guard scenes with every validation and at the end; see `interfaces.Observer`.

    Logged are `guard_loss` and `guard_loss_base`, of scenes kept aside where there are some. At the end of a run with
    `eval_every`, guard scenes are generated, too: `guard_eval_KEY` and `guard_eval_base_KEY` for each of
    `metrics.SCENE_KEYS`.

    Args:
        validation: of the guard scenes.
        evaluation: of the guard scenes; None where they have no true surfaces, or nothing is to be generated.
        options: of the run.
    """

    def __init__(self, validation: Validation, evaluation: Evaluation | None, options: TrainOptions) -> None:
        self.validation, self.evaluation, self.options = validation, evaluation, options
        self.told: str | None = None  # at the end of the run: what was forgotten

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        if not run.is_last and not run.is_due(self.options.validate_every):
            return {}
        watched = self.validation
        values: dict[str, Any] = {"guard_loss": mean(watched.measure(run.world, run.device))}
        if watched.base is None:
            watched.measure_base(run.world, run.device)
        values["guard_loss_base"] = watched.base
        text = f"loss {values['guard_loss']:.4f} (base {watched.base:.4f})"
        if run.world.is_main:
            say(f"step {run.step}: guard scenes: {text}")
        if run.is_last:
            generated = self._generated(run) if self.evaluation is not None else {}
            values |= generated
            self.told = text + "".join(
                f", {key} {generated[f'guard_eval_{key}']:.4f} (base {generated[f'guard_eval_base_{key}']:.4f})"
                for key in _SHOWN
                if None not in (generated.get(f"guard_eval_{key}"), generated.get(f"guard_eval_base_{key}"))
            )
        return values

    def _generated(self, run: RunView) -> dict[str, float | None]:
        adapted = self.evaluation.measure(run.world, run.device)
        with lora.without(self.validation.networks):
            base = self.evaluation.measure(run.world, run.device)
        found = {f"guard_eval_{key}": value for key, value in adapted.items()}
        return found | {f"guard_eval_base_{key}": value for key, value in base.items()}

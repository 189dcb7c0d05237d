"""Every option of training, with its default and what it may be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..common import shared_options as shared
from ..common.options import Old, Options, gone, option, renamed
from ..common.overwriting import same_place
from ..data.sets import data_sets, split_weight
from ..lora.config import DEFAULT_TARGETS, INITS, LoRAConfig, exported_config, parse_pattern
from ..runtime.exclusions import QUANTIZATIONS, check_base

# What a run writes into its output folder, besides checkpoint-N.
BELONGINGS = re.compile(
    r"lora-(final|best|epoch-\d+)(-ema)?|samples|config\.yaml|metrics\.jsonl|loss\.png|error\.log|run\.json"
    r"|events\.out\.tfevents\..*"
)
_USUAL_RATE = 1e-4  # stands for one that is not known yet
MOST_CHANGE = 1e30  # of a weight in one step; AdamW multiplies it by up to 10 at first, and fp32 ends at 3e38
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
CHECKPOINTING = ("off", "full", "selective")
BASES = ("none", *QUANTIZATIONS)
TASKS = ("lora", "distill")
AUTO = "auto"  # of learning_rate
_OF_TASK = {  # options that one task alone looks at
    "lora": "sigma_density sigma_range logit_mean logit_std loss_weighting condition_dropout single_object_share "
    "train_image_encoders preserve preserve_data",
    "distill": "distill_steps distill_shift teacher_steps teacher_guidance_scale walk_epochs",
}
BEST_METRICS = (
    "val_loss", "val_loss_ema", "eval_scene_f_score", "eval_object_f_score", "eval_scene_chamfer",
    "eval_object_chamfer", "eval_bounding_box_iou",
)  # fmt: skip

# What fits which GPU with published weights; the file and flags override each value. The table "Small GPUs" of
# examples/benchmarks/README.md says what they reserve: there is room for CUDA and a desktop beside it. Memory goes to
# instances and rank, hence few scenes at once and no dropout, which keeps more of each adapter's input.
_SMALL = {"mixed_precision": "bf16", "gradient_checkpointing": "full", "batch_size": 1, "lora_dropout": 0.0}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "6gb": {**_SMALL, "quantize_base": "int8", "lora_rank": 8, "lora_alpha": 8.0, "max_num_instances": 3},
    "8gb": {**_SMALL, "lora_rank": 8, "lora_alpha": 8.0, "max_num_instances": 4},
    "12gb": {**_SMALL, "lora_rank": 16, "lora_alpha": 16.0, "max_num_instances": 7},
    "16gb": {**_SMALL, "lora_rank": 32, "lora_alpha": 32.0, "max_num_instances": 5, "batch_size": 2},
    "24gb": {**_SMALL, "lora_rank": 64, "lora_alpha": 64.0, "max_num_instances": 7, "batch_size": 2},
}


_data = partial(option, group="data")
_adapter = partial(option, group="adapter")
_optimisation = partial(option, group="optimisation")
_distill = partial(option, group="distillation (task distill)")
_memory = partial(option, group="memory and speed")
_watching = partial(option, group="evaluation and previews", alters_run=False)
_saving = partial(option, group="saving", alters_run=False)

_OLD = (
    renamed("train_towers", "train_image_encoders", bool),
    renamed("lora_tower_targets", "lora_image_encoder_targets", str, many=True),
    Old(
        "recompute",
        str,
        "is a value of --gradient_checkpointing now: off, full or selective",
        lambda value: {} if value == "full" else {"gradient_checkpointing": value},
    ),
    gone("cuda_graphs", bool, "is no choice any more: passes are recorded wherever they can be, with the same bits"),
    gone("adam_beta1", float, "is no choice any more: it is 0.9"),
    gone("adam_beta2", float, "is no choice any more: it is 0.999"),
    gone("adam_epsilon", float, "is no choice any more: it is 1e-8"),
    gone("compare_scenes", int, "is no choice any more: previews compare base, adapter and truth (preview_every)"),
    gone("eval_inference_steps", int, "is no choice any more: scenes are sampled as the model says"),
    gone("eval_guidance_scale", float, "is no choice any more: scenes are sampled as the model says"),
    gone("eval_grid_depth", int, "is no choice any more: scenes are sampled as the model says"),
    gone("max_bad_steps", int, "is no choice any more: a run stops after more than 10 skipped steps in a row"),
)


@dataclass(frozen=True)
class TrainOptions(Options):
    """Train a LoRA on a folder of samples."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    old_spellings: ClassVar[Sequence[Old]] = _OLD

    preset: str | None = option(
        None, "settings for a GPU of that size; others override them", tuple(PRESETS), alters_run=False
    )
    dry_run: bool = option(
        False, "print sizes, memory per preset and the time of two steps; write nothing", alters_run=False
    )
    task: str = option(
        "lora", "lora adapts to the data; distill makes scenes in a few steps without guidance, from pictures", TASKS
    )
    pretrained_model: str = shared.pretrained_model()
    device: str | None = shared.device(alters_run=False)
    seed: int = option(42, "all randomness is a function of this, the step and the scene", least=0)

    data_dir: str | tuple[str, ...] | None = _data(
        None,
        "folder of samples made by prepare_data.py, or demo, which is shipped; or several, as DIR=WEIGHT "
        "DIR=WEIGHT: weights are shares of the scenes drawn",
        required="a folder made by examples/prepare_data.py",
        reads=True,
    )
    front3d_list: str | None = shared.front3d_list(group="data")
    skip_bad_samples: bool = _data(False, "leave out samples that can't be used instead of stopping; they are listed")
    val_fraction: float = _data(
        0.0, "share of the scenes kept aside for validation, chosen by name; 0 keeps none", least=0, below=1
    )
    val_dir: str | tuple[str, ...] | None = _data(
        None,
        "folder of validation samples (or several, each measured by itself, too), instead of val_fraction; of 3D-Front "
        "with front3d_list train, its test rooms",
        reads=True,
    )
    max_num_instances: int = _data(
        7, "most instances of a scene used in one step; others wait for another step", least=1
    )
    min_mask_share: float = _data(
        0.0, "instances that cover less of the picture than this share are left out", least=0, most=1
    )
    preserve_data: str | None = _data(
        None,
        "folder of samples of what shall not be forgotten, for preserve (default: training pictures, with what the "
        "base makes of them)",
        reads=True,
    )
    mask_variants: tuple[int, ...] = _data((0,), "mask sizes in pixels more (or less) to choose from, such as 0 2 -2")
    picture_fit: str | None = shared.picture_fit(group="data")
    num_tokens: int | None = _data(
        None, "latent tokens per instance (default: the transformer's width)", least=1, most=2**16
    )
    cache_dir: str | None = _data(None, "where encoded samples are kept (default: OUTPUT_DIR/cache)", alters_run=False)
    no_cache: bool = _data(False, "encode samples anew at every step instead of storing them", alters_run=False)

    base_lora_path: tuple[str, ...] | None = _adapter(
        None, "adapters that belong to the base: on while training, and never changed", reads=True
    )
    lora_rank: int = _adapter(16, "inner width of the adapter", least=1)
    lora_alpha: float = _adapter(16.0, "scale numerator: the adapter acts with alpha / rank", above=0)
    lora_dropout: float = _adapter(0.1, "dropout on the adapter's input", least=0, most=1)
    lora_target_modules: tuple[str, ...] = _adapter(
        DEFAULT_TARGETS, "linears to adapt: last names (to_q), ranges (blocks.8-12.attn1.*), patterns (blocks.*.ff.*)"
    )
    train_image_encoders: bool = _adapter(False, "adapt the image encoders, too; they run in every step then")
    lora_image_encoder_targets: tuple[str, ...] | None = _adapter(
        None, "their linears to adapt, as q_proj or image_encoder_2.*.value (default: all of their attention)"
    )
    lora_rank_pattern: tuple[str, ...] | None = _adapter(None, "other ranks for some linears, as blocks.8-12.*=32")
    lora_alpha_pattern: tuple[str, ...] | None = _adapter(None, "other alphas for some of them, likewise")
    use_rslora: bool = _adapter(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = _adapter(False, "train a magnitude per output beside the direction (DoRA)")
    lora_init: str = _adapter("kaiming", "start of the adapter: random, or the weights' principal components", INITS)
    lora_plus_ratio: float = _adapter(
        1.0, "learning rate of B as a multiple of A's (LoRA+; its authors use 16)", above=0
    )
    enable_multi_instance_attention: bool = _adapter(True, "let the instances of a scene attend to each other")
    mi_attention_blocks: tuple[str, ...] | None = shared.mi_attention_blocks(group="adapter")

    batch_size: int = _optimisation(4, "scenes per process and step", least=1)
    num_epochs: int = _optimisation(100, "passes over the data", least=1)
    max_train_steps: int | None = _optimisation(None, "optimizer steps; overrides num_epochs", least=1)
    gradient_accumulation_steps: int = _optimisation(1, "batches per optimizer step", least=1)
    learning_rate: float | str = _optimisation(
        1e-4, "peak learning rate of AdamW; auto finds it while training (Prodigy)", least=0, words=(AUTO,)
    )
    lr_scheduler: str = _optimisation("constant_with_warmup", "learning rate over the steps", SCHEDULES)
    lr_warmup_steps: int = _optimisation(
        0, "optimizer steps of linear warm-up; none with learning_rate auto, which grows", least=0
    )
    weight_decay: float = _optimisation(1e-2, "AdamW's weight decay", least=0)
    max_grad_norm: float = _optimisation(1.0, "clip the gradient's norm to this; 0 never clips", least=0)
    ema_decay: float = _optimisation(
        0.0, "decay of a moving average of the adapter, saved beside it; 0 keeps none", least=0, below=1
    )
    sigma_density: str = _optimisation(
        "logit_normal", "how noise levels are drawn", ("logit_normal", "uniform", "mode")
    )
    logit_mean: float = _optimisation(0.0, "mean of the logit-normal density")
    logit_std: float = _optimisation(1.0, "standard deviation of the logit-normal density")
    sigma_range: tuple[float, float] = _optimisation(
        (0.0, 1.0), "noise levels to train, lowest and highest: the density is squeezed between them", least=0, most=1
    )
    loss_weighting: str = _optimisation("none", "weight of the loss over sigma", ("none", "sigma_sqrt", "cosmap"))
    condition_dropout: float = _optimisation(0.1, "probability of zeroing all conditions of a scene", least=0, most=1)
    single_object_share: float = _optimisation(
        0.3, "probability of training a scene's objects each on its own", least=0, most=1
    )

    preserve: float = _optimisation(
        0.0,
        "forget nothing: weight of the squared difference between adapted network and base on guard scenes, such as 1; "
        "0 has none",
        least=0,
    )

    distill_steps: int = _distill(4, "steps that the adapter is to make a scene in", least=1, most=50)
    distill_shift: float | None = _distill(
        None,
        "spread of the noise levels of its steps: above 1 more of them at high noise (default: the model's)",
        least=0.01,
        most=100,
    )
    teacher_steps: int = _distill(24, "guided steps of the teacher, a multiple of distill_steps", least=1, most=1000)
    teacher_guidance_scale: float | None = _distill(
        None, "the teacher's guidance (default: the model's own)", least=0, most=1000
    )
    walk_epochs: int = _distill(8, "epochs that each walk of the teacher is used for", least=1)

    mixed_precision: str = _memory("no", "type of the frozen base; the adapter is always fp32", shared.PRECISIONS)
    gradient_checkpointing: str = _memory(
        "off",
        "compute again in the backward pass, to save memory: nothing, whole blocks, or (selective) all but attention; "
        "the flag alone means full",
        CHECKPOINTING,
        switch=("off", "full"),
        alters_run=False,
    )
    compile: bool = _memory(False, "compile the transformer's blocks: faster steps after a slow first one")
    deterministic: bool = _memory(
        True, "on a GPU, the same bits at every run; without it a step takes up to a third less time", alters_run=False
    )
    quantize_base: str = _memory(
        "none", "keep the frozen base in eight bits: int8 (any device), or fp8 (Ada, Hopper and later GPUs)", BASES
    )
    offload_blocks: bool = _memory(
        False, "keep the frozen base in host memory and copy each block to the GPU when it runs", alters_run=False
    )
    shard_base: bool = _memory(
        False, "split the frozen base over the processes, for GPUs that can't hold it", alters_run=False
    )
    balance_scenes: bool = _memory(False, "deal out the scenes of a step so that all processes have as much to do")

    validate_every: int = _watching(100, "validation loss every so many steps and at the end; 0 never", least=0)
    eval_every: int = _watching(0, "generate validation scenes and measure them every so many steps; 0 never", least=0)
    preview_every: int = _watching(
        500,
        "pictures (input, base, adapted, truth) every so many steps, and after the last of a run that long; 0 never",
        least=0,
    )
    preview_viewer: bool = _watching(
        False, "with them a page for each scene, in which base, adapted and truth turn: samples/step-N/SCENE.html"
    )
    eval_scenes: int = _watching(4, "most scenes that are generated for that", least=1)
    best_metric: str | None = _watching(
        None, "what lora-best is best in (default: val_loss, or eval_scene_f_score)", BEST_METRICS
    )

    patience: int = _watching(
        0,
        "end the run when so many evaluations in a row were no better than lora-best, which is kept; 0 never",
        least=0,
    )

    output_dir: str = _saving("outputs/lora_finetune", "where adapters, checkpoints and logs go")
    checkpointing_steps: int = _saving(500, "full state every so many optimizer steps; 0 never", least=0)
    keep_checkpoints: int = _saving(0, "remove all but so many of the last full states; 0 keeps all", least=0)
    save_every_n_epochs: int = _saving(10, "adapter every so many epochs; 0 never", least=0)
    resume_from_checkpoint: str | None = _saving(
        None, "'latest' or a checkpoint folder; steps and validation may grow (default: none, start afresh)"
    )
    allow_config_change: bool = _saving(False, "resume although options or data that alter the run differ")
    logging_steps: int = _saving(1, "progress line and metrics every so many optimizer steps", least=1)

    def check_together(self) -> None:
        """Raise ValueError where options that are fine alone do not fit each other."""
        if self.lora_image_encoder_targets is not None and not self.train_image_encoders:
            raise ValueError("lora_image_encoder_targets is given without train_image_encoders, so it would do nothing")
        check_base(self.forms(), training=True)
        if self.base_lora_path and self.shard_base:
            raise ValueError("shard_base and base_lora_path can't be combined: merge the adapters into the base first")
        self._check_task()
        self._check_sets()
        self._check_folders()
        exported_config(self.adapter_config())  # what is saved is checked now, not when it is saved
        self._check_optimisation()
        self._check_validation()

    def inputs(self) -> list[tuple[str, str]]:
        """(option, path) of every file and folder that is read; data sets without their weights."""
        return [(name, split_weight(path)[0] if name == "data_dir" else path) for name, path in super().inputs()]

    def _check_task(self) -> None:
        """Options that the other task looks at would do nothing."""
        for task, names in _OF_TASK.items():
            changed = [name for name in names.split() if getattr(self, name) != getattr(type(self), name)]
            if task != self.task and changed:
                raise ValueError(f"{changed[0]} is given, which only task {task} looks at, but the task is {self.task}")
        if self.task != "distill":
            return
        if self.teacher_steps % self.distill_steps:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps}, expected a multiple of distill_steps {self.distill_steps}"
            )
        if self.shard_base:
            raise ValueError("shard_base and task distill can't be combined: each process walks scenes of its own")

    def _check_sets(self) -> None:
        if self.preserve_data is not None and not self.preserve:
            raise ValueError(
                "preserve_data is given without preserve, so it would do nothing: pass a weight, such as 1"
            )
        if self.preserve and self.preserve_data is None and self.shard_base:
            raise ValueError(
                "shard_base and preserve without preserve_data can't be combined: each process samples its own pictures"
            )
        data_sets(self.data_dir)
        for part in data_sets(self.val_dir):
            if part.weight is not None:
                raise ValueError(f"val_dir {part.path} has a weight, but every validation scene counts the same")

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes anything again."""
        return self.gradient_checkpointing != "off"

    def adapter_config(self) -> LoRAConfig:
        """The adapter that the options ask for. Raises ValueError naming what makes none."""
        ranks = parse_pattern("lora_rank_pattern", self.lora_rank_pattern or (), int)
        alphas = parse_pattern("lora_alpha_pattern", self.lora_alpha_pattern or (), float)
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            use_rslora=self.use_rslora,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_dora=self.use_dora,
            init=self.lora_init,
        )

    def _check_folders(self) -> None:
        """What is read may not lie where a run writes: earlier content there is moved aside when a run begins."""
        for name, path in self.inputs():
            inside = [part for part in (Path(path), *Path(path).parents) if same_place(part.parent, self.output_dir)]
            if same_place(path, self.output_dir) or any(BELONGINGS.fullmatch(part.name) for part in inside):
                raise ValueError(
                    f"output_dir {self.output_dir} would be written over {name} {path}, which is read: choose another "
                    "output_dir"
                )

    @property
    def quantized(self) -> str | None:
        """In which eight bits the base is kept, if in any."""
        return None if self.quantize_base == "none" else self.quantize_base

    def forms(self) -> dict[str, object]:
        """What decides in which forms the base can be kept and run (runtime/exclusions.py)."""
        names = ("compile", "offload_blocks", "shard_base", "train_image_encoders")
        return {
            **{name: getattr(self, name) for name in names},
            "quantize_base": self.quantized,
            "gradient_checkpointing": self.recomputes,
            "fp16": self.mixed_precision == "fp16",
        }

    def _check_optimisation(self) -> None:
        low, high = self.sigma_range
        if not low < high:
            raise ValueError(f"sigma_range is {low:g} {high:g}, expected the lower noise level first")
        rate = _USUAL_RATE if self.learning_rate == AUTO else self.learning_rate
        if rate * max(1.0, self.lora_plus_ratio) * max(1.0, self.weight_decay) > MOST_CHANGE:
            raise ValueError(
                f"learning_rate {self.learning_rate} (with lora_plus_ratio {self.lora_plus_ratio:g} and weight_decay "
                f"{self.weight_decay:g}) is beyond what fp32 can hold; usual learning rates are 1e-5 to 1e-3"
            )

    def _check_validation(self) -> None:
        if self.val_fraction and self.val_dir:
            raise ValueError("val_fraction and val_dir are both given: keep some scenes aside, or name others")
        has_validation = bool(self.val_fraction or self.val_dir)
        if self.patience and not (has_validation and (self.validate_every or self.eval_every)):
            raise ValueError(
                "patience needs validation: pass val_fraction or val_dir, and validate_every or eval_every"
            )
        if self.preview_viewer and not self.preview_every:
            raise ValueError("preview_viewer needs previews: pass preview_every, too")
        if self.eval_every and not has_validation:
            raise ValueError("eval_every needs validation scenes: pass val_fraction or val_dir, too")
        for start, given, needed in (
            ("val_", has_validation and self.validate_every, "val_fraction or val_dir, and validate_every"),
            ("val_loss_ema", self.ema_decay, "ema_decay"),
            ("eval_", self.eval_every, "eval_every"),
        ):
            if (self.best_metric or "").startswith(start) and not given:
                raise ValueError(f"best_metric {self.best_metric} needs {needed}")

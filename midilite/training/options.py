"""Every option of training, with its default and what it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.options import option
from ..lora.config import DEFAULT_TARGETS, INITS, LoRAConfig, parse_pattern

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
RECOMPUTATIONS = ("full", "selective")
BASES = ("none", "int8", "fp8")
BEST_METRICS = (
    "val_loss", "val_loss_ema", "eval_scene_f_score", "eval_object_f_score", "eval_scene_chamfer",
    "eval_object_chamfer", "eval_bounding_box_iou",
)  # fmt: skip

# What fits which GPU with published weights; the file and flags override each value. Measured on an H100, they reserve
# 4.1, 6.6, 8.8, 10.5 and 13.7 GiB (benchmarks/results/benchmark_h100.jsonl), so there is room for CUDA and a desktop.
_SMALL = {"mixed_precision": "bf16", "gradient_checkpointing": True, "batch_size": 1}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "6gb": {**_SMALL, "quantize_base": "int8", "lora_rank": 8, "lora_alpha": 8.0, "max_num_instances": 3},
    "8gb": {**_SMALL, "lora_rank": 8, "lora_alpha": 8.0, "max_num_instances": 4},
    "12gb": {**_SMALL, "lora_rank": 16, "lora_alpha": 16.0, "max_num_instances": 7},
    "16gb": {**_SMALL, "lora_rank": 32, "lora_alpha": 32.0, "max_num_instances": 5, "batch_size": 2},
    "24gb": {**_SMALL, "lora_rank": 64, "lora_alpha": 64.0, "max_num_instances": 7, "batch_size": 2},
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of `examples/train.py`; see the help texts."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    preset: str | None = option(None, "settings for a GPU of that size; others override them", tuple(PRESETS), False)
    dry_run: bool = option(
        False, "print sizes, memory per preset and the time of two steps; write nothing", None, False
    )
    pretrained_model: str = option("tiny", "checkpoint folder, name of a shipped model, or hub:OWNER/NAME")
    data_dir: str | None = option(None, "folder of samples made by prepare_data.py, or demo, which is shipped")
    skip_bad_samples: bool = option(False, "leave out samples that can't be used instead of stopping; they are listed")
    val_fraction: float = option(0.0, "share of the scenes kept aside for validation, chosen by name; 0 keeps none")
    val_dir: str | None = option(None, "folder of validation samples, instead of val_fraction")
    output_dir: str = option("outputs/lora_finetune", "where adapters, checkpoints and logs go", alters_run=False)
    cache_dir: str | None = option(None, "where encoded samples are kept (default: OUTPUT_DIR/cache)", alters_run=False)
    no_cache: bool = option(False, "encode samples anew at every step instead of storing them", alters_run=False)
    device: str | None = option(None, "cpu, cuda or cuda:N (default: a GPU when there is one)", alters_run=False)

    batch_size: int = option(1, "scenes per process and step")
    num_epochs: int = option(100, "passes over the data")
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    learning_rate: float = option(1e-4, "peak learning rate of AdamW")
    lr_scheduler: str = option("constant_with_warmup", "learning rate over the steps", SCHEDULES)
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up")
    adam_beta1: float = option(0.9, "AdamW's first moment decay")
    adam_beta2: float = option(0.999, "AdamW's second moment decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(1e-2, "AdamW's weight decay")
    max_bad_steps: int = option(10, "stop after more skipped (not finite) steps in a row than this")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0 never clips")
    ema_decay: float = option(0.0, "decay of a moving average of the adapter, saved beside it; 0 keeps none")
    seed: int = option(42, "all randomness is a function of this, the step and the scene")

    lora_rank: int = option(16, "inner width of the adapter")
    lora_alpha: float = option(16.0, "scale numerator: the adapter acts with alpha / rank")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    lora_target_modules: tuple[str, ...] = option(
        DEFAULT_TARGETS, "linears to adapt: last names (to_q), ranges (blocks.8-12.attn1.*), patterns (blocks.*.ff.*)"
    )
    train_towers: bool = option(False, "adapt the image towers, too; they run in every step then")
    lora_tower_targets: tuple[str, ...] | None = option(
        None, "the towers' linears to adapt, as q_proj or image_encoder_2.*.value (default: all of their attention)"
    )
    lora_rank_pattern: tuple[str, ...] | None = option(None, "other ranks for some of them, as blocks.8-12.*=32")
    lora_alpha_pattern: tuple[str, ...] | None = option(None, "other alphas for some of them, likewise")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = option(False, "train a magnitude per output beside the direction (DoRA)")
    lora_init: str = option("kaiming", "start of the adapter: random, or the weights' principal components", INITS)
    lora_plus_ratio: float = option(1.0, "learning rate of B as a multiple of A's (LoRA+; its authors use 16)")

    mixed_precision: str = option("no", "type of the frozen base; the adapter is always fp32", PRECISIONS)
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass to save memory", alters_run=False
    )
    recompute: str = option(
        "full", "what that recomputes: whole blocks, or (selective) all but attention", RECOMPUTATIONS, alters_run=False
    )
    compile: bool = option(False, "compile the transformer's blocks: faster steps after a minute or two")
    deterministic: bool = option(
        True, "on a GPU, the same bits at every run; without it a step takes up to a third less time", alters_run=False
    )
    cuda_graphs: bool = option(
        True, "on a GPU, record the passes of a step and replay them, where that can be done", alters_run=False
    )
    quantize_base: str = option(
        "none", "keep the frozen base in eight bits: int8 (any device), or fp8 (Ada, Hopper and later GPUs)", BASES
    )
    offload_blocks: bool = option(
        False, "keep the frozen base in host memory and copy each block to the GPU when it runs", alters_run=False
    )
    shard_base: bool = option(
        False, "split the frozen base over the processes, for GPUs that can't hold it", alters_run=False
    )
    balance_scenes: bool = option(False, "deal out the scenes of a step so that all processes have as much to do")
    enable_multi_instance_attention: bool = option(True, "let the instances of a scene attend to each other")
    mi_attention_blocks: tuple[str, ...] | None = option(
        None, "blocks with multi-instance attention, as blocks.8 or 8 (default: the model's own)"
    )

    sigma_density: str = option("logit_normal", "how noise levels are drawn", ("logit_normal", "uniform", "mode"))
    logit_mean: float = option(0.0, "mean of the logit-normal density")
    logit_std: float = option(1.0, "standard deviation of the logit-normal density")
    loss_weighting: str = option("none", "weight of the loss over sigma", ("none", "sigma_sqrt", "cosmap"))
    condition_dropout: float = option(0.1, "probability of zeroing all conditions of a scene")
    single_object_share: float = option(0.3, "probability of training a scene's objects each on its own")
    max_num_instances: int = option(7, "most instances of a scene used in one step; others wait for another step")
    min_mask_share: float = option(0.0, "instances that cover less of the picture than this share are left out")
    mask_variants: tuple[int, ...] = option((0,), "mask sizes in pixels more (or less) to choose from, such as 0 2 -2")
    num_tokens: int | None = option(None, "latent tokens per instance (default: the transformer's width)")

    checkpointing_steps: int = option(500, "full state every so many optimizer steps; 0 never", alters_run=False)
    keep_checkpoints: int = option(0, "remove all but so many of the last full states; 0 keeps all", alters_run=False)
    save_every_n_epochs: int = option(10, "adapter every so many epochs; 0 never", alters_run=False)
    resume_from_checkpoint: str | None = option(None, "'latest' or a checkpoint folder", alters_run=False)
    allow_config_change: bool = option(False, "resume although options that alter the run differ", alters_run=False)
    logging_steps: int = option(1, "progress line and metrics every so many optimizer steps", alters_run=False)

    validate_every: int = option(100, "validation loss every so many steps and at the end; 0 never", alters_run=False)
    eval_every: int = option(
        0, "generate validation scenes and measure them every so many steps; 0 never", alters_run=False
    )
    preview_every: int = option(500, "pictures of generated scenes every so many steps; 0 never", alters_run=False)
    compare_scenes: int = option(
        0, "scenes of the picture at the end: input, base, adapted, truth (at most eval_scenes)", alters_run=False
    )
    eval_scenes: int = option(4, "most scenes that are generated for that", alters_run=False)
    eval_inference_steps: int = option(25, "their denoising steps", alters_run=False)
    eval_guidance_scale: float = option(7.0, "their classifier-free guidance", alters_run=False)
    eval_grid_depth: int = option(6, "their surface grid: 2^depth cells per axis", alters_run=False)
    best_metric: str | None = option(
        None, "what lora-best is best in (default: val_loss, or eval_scene_f_score)", BEST_METRICS, alters_run=False
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1), ("num_epochs", 1), ("gradient_accumulation_steps", 1), ("lora_rank", 1),
            ("max_num_instances", 1), ("logging_steps", 1), ("lr_warmup_steps", 0), ("checkpointing_steps", 0),
            ("keep_checkpoints", 0), ("save_every_n_epochs", 0), ("learning_rate", 0), ("weight_decay", 0),
            ("max_grad_norm", 0), ("seed", 0),
            ("validate_every", 0), ("eval_every", 0), ("preview_every", 0), ("compare_scenes", 0), ("eval_scenes", 1),
            ("eval_inference_steps", 1), ("eval_grid_depth", 3), ("eval_guidance_scale", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("condition_dropout", "single_object_share", "lora_dropout", "min_mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability between 0 and 1")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise ValueError(f"max_train_steps is {self.max_train_steps}, expected at least 1")
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, expected at least 1")
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"lora_plus_ratio is {self.lora_plus_ratio}, expected a number above 0")
        if self.lora_tower_targets is not None and not self.train_towers:
            raise ValueError("lora_tower_targets is given without train_towers, so it would do nothing")
        self._check_base()
        self.adapter_config()
        self._check_validation()

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

    def _check_base(self) -> None:
        if self.offload_blocks and not self.gradient_checkpointing:
            raise ValueError(
                "offload_blocks needs gradient_checkpointing: without it all blocks' weights are needed until the end "
                "of the backward pass"
            )
        if self.recompute != "full" and not self.gradient_checkpointing:
            raise ValueError(f"recompute {self.recompute} says what gradient_checkpointing does: pass that, too")
        if self.compile and (self.shard_base or self.offload_blocks):
            raise ValueError("compile needs weights that stay where they are: not with shard_base or offload_blocks")
        for name, on in (("offload_blocks", self.offload_blocks), ("quantize_base", self.quantize_base != "none")):
            if self.shard_base and on:
                raise ValueError(f"shard_base and {name} exclude each other: they keep the base in different forms")

    def _check_validation(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, expected a share from 0 to less than 1")
        if self.val_fraction and self.val_dir:
            raise ValueError("val_fraction and val_dir are both given: keep some scenes aside, or name others")
        has_validation = bool(self.val_fraction or self.val_dir)
        if self.eval_every and not has_validation:
            raise ValueError("eval_every needs validation scenes: pass val_fraction or val_dir, too")
        if self.eval_grid_depth > 10:
            raise ValueError(f"eval_grid_depth is {self.eval_grid_depth}, expected 3 to 10")
        for start, given, needed in (
            ("val_", has_validation and self.validate_every, "val_fraction or val_dir, and validate_every"),
            ("val_loss_ema", self.ema_decay, "ema_decay"),
            ("eval_", self.eval_every, "eval_every"),
        ):
            if (self.best_metric or "").startswith(start) and not given:
                raise ValueError(f"best_metric {self.best_metric} needs {needed}")

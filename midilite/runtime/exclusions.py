"""Which forms of a base exclude each other: one table for training, inference and `load_pipeline`. Never imports torch.

A base can be kept in eight bits, in host memory (its blocks visit the GPU) or split over processes, it can be run
compiled, and its training passes can be captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping

QUANTIZATIONS = ("int8", "fp8")

_MOVES = "compiled blocks need weights that stay where they are"
_FORMS = "they keep the base in different forms"
_EXCLUDED = (
    ("compile", "offload_blocks", _MOVES),
    ("compile", "shard_base", _MOVES),
    ("shard_base", "offload_blocks", _FORMS),
    ("shard_base", "quantize_base", _FORMS),
)

# Why a training pass can't be captured; each is the name of an option that is on, or fp16.
_NOT_CAPTURED = {
    "fp16": "the loss is scaled by a number that changes",
    "shard_base": "weights come and go",
    "offload_blocks": "weights come and go",
    "train_image_encoders": "conditions are computed in every pass",
}


def check_base(wanted: Mapping[str, object], training: bool = False) -> None:
    """Raise ValueError for forms of the base that exclude each other, before anything is loaded.

    Args:
        wanted: {name of an option: its value} of `compile`, `quantize_base`, `offload_blocks`, `shard_base` and, in
            training, `gradient_checkpointing`; what is absent or false is off.
        training: whether there is a backward pass.
    """
    for first, second, reason in _EXCLUDED:
        if wanted.get(first) and wanted.get(second):
            raise ValueError(f"{first} and {second} exclude each other: {reason}")
    if training and wanted.get("offload_blocks") and not wanted.get("gradient_checkpointing"):
        raise ValueError(
            "offload_blocks needs gradient_checkpointing: without it all blocks' weights are needed until the end of "
            "the backward pass"
        )


def not_captured(wanted: Mapping[str, object]) -> list[str]:
    """Why training passes can't be captured as CUDA graphs with these options; empty when they can."""
    return [reason for name, reason in _NOT_CAPTURED.items() if wanted.get(name)]

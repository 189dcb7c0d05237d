"""Adapters inside a network and adapter files. The verbs: `from midilite import lora; lora.inject(...)`.

`network.py` says what they do. They are looked up when they are used, so that naming this package brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_FROM = {
    "config": "DEFAULT_TARGETS LoRAConfig exported_config match_targets matches",
    "network": "active_weights adapter_names adapter_parameters adapter_state adapters_named check_weight freeze_base "
    "inject load_adapter_state merge_adapters named_linears planned_parameters remove_adapters set_adapters slots "
    "temporary_weights without",
}
_WHERE = {name: module for module, names in _FROM.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module 'midilite.lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

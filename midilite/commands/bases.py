"""Which base a command takes: the one that is named, else the one that its adapters name, else the one that ships.

An adapter knows its base by the last name of the folder it was trained on, or by its `hub:` name
(`lora.files.describe`); that is looked for here, in `pretrained_weights/`, beside the adapter's own run, and among
what ships. Nothing is downloaded without being asked for. Loading still compares fingerprints: a name can lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import shared_options as shared
from ..common.options import Options
from ..common.overwriting import refuse_overwriting
from ..common.terminal import printable

SHIPPED = "tiny"
_SAMPLING = ("num_inference_steps", "guidance_scale", "solver", "guidance_interval")
_PLACES = (".", "pretrained_weights", "models")


@dataclass(frozen=True)
class BaseOptions(Options):
    """The options of a command that takes a base and perhaps adapters of it; those add `lora_path`."""

    pretrained_model: str | None = shared.base_model()

    def inputs(self) -> list[tuple[str, str]]:
        """Also the shipped base, where none is named."""
        return super().inputs() + ([] if self.pretrained_model else [("pretrained_model", SHIPPED)])

    def base(self) -> str:
        """The name of the base, see `choose_base`, which nothing that is written may replace. Raises ValueError."""
        found = choose_base(self.pretrained_model, getattr(self, "lora_path", None) or ())
        refuse_overwriting(self.outputs(), [("the base", found)])
        return found


def given_sampling(options: Any) -> dict[str, Any]:
    """How scenes are to be sampled, by the names that a pipeline takes; None is what model and adapters say."""
    return {name: getattr(options, name) for name in _SAMPLING}


def choose_base(given: str | None, adapters: Sequence[str]) -> str:
    """The name of a base for `ModelFolder`.

    Args:
        given: what the user says; None leaves it to the adapters.
        adapters: files and folders of adapters, perhaps none.

    Raises:
        ValueError: an adapter can't be read, they name different bases, or the one named is nowhere here; one sentence
            says which is needed.
    """
    if given is not None or not adapters:
        return given or SHIPPED
    from ..lora.files import read_adapter

    named = {path: read_adapter(path).metadata.get("base_model") for path in adapters}
    bases = {path: base for path, base in named.items() if isinstance(base, str) and base}
    if len(set(bases.values())) > 1:
        both = ", ".join(f"{path} {printable(base)[:80]}" for path, base in bases.items())
        raise ValueError(f"the adapters name different bases ({both}): pass --pretrained_model")
    if not bases:
        return SHIPPED  # whether it fits is found when it is loaded
    path, base = next(iter(bases.items()))
    found = next(_places_of(base, path), None)
    if found is None:
        raise ValueError(
            f"{path}: needs the base {printable(base)[:200]}, which it was trained on: pass --pretrained_model with it"
        )
    return found


def _places_of(base: str, adapter: str) -> Iterator[str]:
    """Where a base of that name is, as names for `ModelFolder`."""
    from ..model.folder import is_shipped

    if base.startswith("hub:") or "\0" in base:
        return
    last = Path(base).name  # others write whole paths
    for folder in (*(Path(place) for place in _PLACES), *Path(adapter).resolve().parents[:3]):
        if (folder / last / "model_index.json").is_file():
            yield str(folder / last)
    if is_shipped(last):
        yield last

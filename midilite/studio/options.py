"""The options of the studio, and `midilite studio` itself."""

from __future__ import annotations

from dataclasses import dataclass

from ..common import shared_options as shared
from ..common.options import Options, option


@dataclass(frozen=True)
class StudioOptions(Options):
    """A local page: paint the objects of a photograph, make the scene, walk around it, watch trainings."""

    folder: str = option(".", "start folder: models, adapters, runs and data below it are shown, nothing outside of it")
    host: str = option("127.0.0.1", "address to listen at; any other than this machine's own asks for a token")
    port: int = option(8765, "0 takes a free one", least=0, most=65535)
    device: str | None = shared.device()

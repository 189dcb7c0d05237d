"""Options that several commands have, written once; a command calls them in its class and may add a group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from .options import option


def _check_device(name: str, where: str) -> None:
    """Only the name; whether it is there is looked at before the work begins (`devices.choose_device`)."""
    if not re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d{1,3})?", name):
        raise ValueError(f"{where} is {name[:40]!r}, expected cpu, cuda, cuda:N or mps")


def _check_block(name: str, where: str) -> None:
    if not re.fullmatch(r"(blocks\.)?\d{1,4}", name):
        raise ValueError(f"{where} has {name[:40]!r}, expected blocks as blocks.8 or 8")


SOLVERS = ("euler", "ab2", "heun")
PRECISIONS = ("no", "bf16", "fp16")
PICTURE_FITS = ("pad", "reference")  # how pictures that are not square become it, see model/preprocess.py
MIN_OBJECT_PIXELS = 16  # of an object where an image encoder sees it: 4 x 4, a twelfth of a patch of DINOv2
FRONT3D_LISTS = ("midi", "train", "test", "valid")

pretrained_model = partial(option, "tiny", "checkpoint folder, name of a shipped model, or hub:OWNER/NAME", reads=True)
base_model = partial(
    option,
    None,
    "checkpoint folder, shipped model, or hub:OWNER/NAME (default: the base that the adapter names, else tiny)",
    reads=True,
)
device = partial(option, None, "cpu, cuda, cuda:N or mps (default: a GPU when there is one)", check=_check_device)
mi_attention_blocks = partial(
    option, None, "blocks with multi-instance attention, as 8 or blocks.8 (default: the model's)", check=_check_block
)
num_inference_steps = partial(
    option, None, "denoising steps (default: the model's, 50 for published ones)", least=1, most=1000
)
guidance_scale = partial(
    option, None, "1 switches guidance off and halves the work (default: the model's, 7)", least=0, most=1000
)
grid_depth = partial(
    option,
    None,
    "surface grid of 2^depth cells per axis (default: the model's, 8; TripoSG's 9)",
    least=3,
    most=10,
)
solver = partial(
    option,
    None,
    "what is made of the velocities: euler (1 call a step), ab2 (2nd order, 1 call), heun (2nd order, 2 calls)",
    SOLVERS,
)
guidance_interval = partial(
    option, None, "LOW HIGH: noise levels with guidance; outside of them a step is half the work", least=0, most=1
)
seed = partial(option, 42, least=0)
lora_path = partial(option, None, "adapters: folders or files of any format", reads=True)
lora_scale = partial(option, (1.0,), "strength of each adapter, or one for all")
lora_alpha = partial(option, None, "for adapter files that don't hold their alpha (default: their rank)", above=0)
run_precision = partial(option, None, "no, bf16 or fp16 (default: bf16 on a GPU)", PRECISIONS)
num_tokens = partial(option, None, "latent tokens per instance (default: the model's)", least=1, most=2**16)
picture_fit = partial(
    option,
    None,
    "how a picture that is not square comes to the model's square: pad with white, or reference, by the preprocessors "
    "alone, which squash or crop it (default: pad, unless one of them crops, as the published models' does)",
    PICTURE_FITS,
)
mask_background = partial(
    option, None, "the mask's value of the background; all others are objects then (default: found out)", least=-1
)
min_object_pixels = partial(
    option,
    MIN_OBJECT_PIXELS,
    "objects of fewer pixels, where the image encoder sees them, are left out; 0 keeps all",
    least=0,
)
front3d_list = partial(
    option,
    None,
    "3D-Front: which published list; train is midi without its last 1,000 rooms and test is those, as in the reference "
    "(default: midi, or the only list that there is)",
    FRONT3D_LISTS,
)


def check_interval(interval: Sequence[float] | None) -> None:
    """Raise ValueError unless it is a lower and a higher noise level."""
    if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
        given = " ".join(f"{value:g}" for value in interval)
        raise ValueError(f"guidance_interval is {given}, expected two noise levels, the lower one first")


def check_scales(paths: Sequence[str] | None, scales: Sequence[float]) -> None:
    """Raise ValueError for neither one scale for all adapters nor one each."""
    if paths and len(scales) not in (1, len(paths)):
        raise ValueError(f"{len(paths)} adapters but {len(scales)} scales; give one, or one each")

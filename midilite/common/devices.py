"""Which device is meant, and whether it is there: said before anything is loaded, instead of by torch when it fails."""

from __future__ import annotations

import torch


class NoDeviceError(ValueError):
    """There is no such device here."""

    exit_code = 2  # as for any other option that can't be used


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for, else a CUDA GPU when there is one, else the CPU.

    Raises:
        NoDeviceError: torch knows no device of that name, or this machine or build of torch has none.
    """
    if device is None or device == "":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise NoDeviceError(f"device is {str(device)[:40]!r}, expected cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        _check_gpu(chosen)
    elif chosen.type not in ("cpu", "meta"):
        backend = getattr(torch, chosen.type, None)
        if not getattr(backend, "is_available", lambda: False)():
            raise NoDeviceError(f"device is {chosen}, but there is none here; expected cpu, cuda or cuda:N")
    return chosen


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.backends.cuda.is_built() else "this build of torch is for the CPU only"
        raise NoDeviceError(f"device is {device}, but {why}; use cpu, or leave it out to take what is there")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise NoDeviceError(f"device is {device}, but there are {count} GPUs here, counted from cuda:0")

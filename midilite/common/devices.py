"""Which device is meant, and whether it is there: said before anything is loaded, instead of by torch when it fails."""

from __future__ import annotations

import torch

from .terminal import say


class NoDeviceError(ValueError):
    """There is no such device here."""

    exit_code = 2  # as for any other option that can't be used


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for, else a CUDA GPU when there is one, else Apple's, else the CPU.

    Raises:
        NoDeviceError: torch knows no device of that name, or this machine or build of torch has none.
    """
    if device is None or device == "":
        return torch.device("cuda" if torch.cuda.is_available() else _apple_or_cpu())
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise NoDeviceError(f"device is {str(device)[:40]!r}, expected cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda":
        _check_gpu(chosen)
    elif chosen.type not in ("cpu", "meta"):
        backend = getattr(torch, chosen.type, None)
        if not getattr(backend, "is_available", lambda: False)():
            raise NoDeviceError(
                f"device is {chosen}, but there is none here; use cpu, or leave it out to take what is there"
            )
    return chosen


def _apple_or_cpu() -> str:
    """Apple's GPU where it can be used; else the CPU, with a sentence where torch was built for that GPU."""
    if torch.backends.mps.is_available():
        return "mps"
    if torch.backends.mps.is_built():
        say("Apple's GPU can't be used here (torch wants a newer macOS, or there is no Metal): the CPU is used")
    return "cpu"


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.backends.cuda.is_built() else "this build of torch is for the CPU only"
        raise NoDeviceError(f"device is {device}, but {why}; use cpu, or leave it out to take what is there")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise NoDeviceError(f"device is {device}, but there are {count} GPUs here, counted from cuda:0")


def widest_float(device: torch.device) -> torch.dtype:
    """The most precise type that a device computes with: Apple's GPUs have no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def precise_device(device: torch.device) -> torch.device:
    """Where double precision is computed for a device: there, or on the CPU where it has none."""
    return torch.device("cpu") if device.type == "mps" else device

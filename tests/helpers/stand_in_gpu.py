"""A stand-in for Apple's GPU where there is none: tensors that say they are on `mps` and obey its rules.

Its numbers are computed on the CPU. What the real one refuses is refused here, too: double precision, and operations
between tensors of the two devices (numbers without axes may meet others). So a program that runs under `standing_in`
never asks `mps` for what it can't do; whether its numbers are right there, only the real one can say.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

MPS, BEHIND = torch.device("mps", 0), torch.device("meta", 7)  # what is shown, and what torch's own code sees


class OnMPS(torch.Tensor):
    """A tensor that wraps another one of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(False):  # views of weights are counted as outside of it
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=BEHIND)

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):
        return MPS

    def __repr__(self, **_):
        return f"OnMPS({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation on what is wrapped, after looking whether `mps` would do it."""
    tensors, devices = [], []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    tree_map_only(torch.device, devices.append, (args, kwargs))
    if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return False  # a module that moves takes new parameters
    copies = func is torch.ops.aten.copy_.default
    there = any(isinstance(tensor, OnMPS) for tensor in tensors)
    if there and not devices and not copies and any(not isinstance(t, OnMPS) and t.ndim for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found mps and cpu ({func})")
    wrap = devices[0] == BEHIND if devices else bool(tensors) and isinstance(tensors[0], OnMPS)

    def bare(value):
        if isinstance(value, OnMPS):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) and value == BEHIND else value

    result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if not wrap:
        return result
    if func._schema.is_mutable and isinstance(result, torch.Tensor):  # in place: the wrapper that was given
        return kwargs.get("out", args[0] if args else None)
    return tree_map_only(torch.Tensor, OnMPS, result)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Indexed(TorchFunctionMode):
    """`mps` becomes another device before torch's own code asks for a driver that is not there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def indexed(value):
            named = isinstance(value, (str, torch.device)) and str(value) in ("mps", "mps:0")
            return BEHIND if named and func is not torch.device else value

        if args and isinstance(args[0], OnMPS):
            if func is torch.Tensor.tolist:
                return args[0].inner.tolist()
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")
        given = {key: indexed(value) for key, value in (kwargs or {}).items()}
        if func is torch.tensor and given.get("device") == BEHIND:  # made on the CPU without telling modes
            return OnMPS(func(*args, **{**given, "device": "cpu"}))
        return func(*map(indexed, args), **given)


@contextlib.contextmanager
def standing_in(monkeypatch):
    """Within this context there is a device `mps`."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True, raising=False)
    own = torch.default_generator  # functions of our own: torch's compiler keeps a table of torch's
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: own.manual_seed(seed))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: own.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: own.set_state(state))
    with _Indexed(), _Mode():
        yield

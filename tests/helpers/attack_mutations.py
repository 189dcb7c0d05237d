"""Damage of every kind, from a seed: files of any format, values of options, contents of checkpoints."""

from __future__ import annotations

import io
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, 1e300, -1e300, 1e-320, 0.5, float("nan"), float("inf"), -float("inf")]
VALUES = [*NUMBERS, None, True, "", "x", "é" * 300, "../../x", "\0", [], [[]], {}, {"a": {}}, "NaN", "1e999", [1, "2"]]
WORDS = [
    "",
    "x",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e308",
    "1e-320",
    "9" * 30,
    "0x10",
    "None",
    "é",
    "../x",
    "*",
]
WORDS += ["0.5", "1", "2", "3", "true", "\x1b[31m", "a=b", "to_q=", "to_q=0", "to_q=nan", "blocks.*=3", "in", "-"]


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; returns in a word how."""
    own = {".json": _json, ".safetensors": _tensors, ".npy": _array, ".png": _picture}.get(path.suffix)
    kinds = [_empty, _cut, _flip, _flip, _junk, _double, _gone, _folder, _loop, _pipe]
    kind = rng.choice([own] * 6 + kinds if own else kinds)
    try:
        return kind(path, rng) or kind.__name__[1:]
    except (ValueError, TypeError, OverflowError, RuntimeError, OSError):  # such a value does not fit into such a file
        return _junk(path, rng) or "junk"


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        if content:
            at = rng.randrange(min(len(content), rng.choice((16, 200, len(content)))))
            content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _junk(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice((1, 8, 1000, 100_000))))


def _double(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice((path.name, "nowhere")))


def _pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _json(path: Path, rng: random.Random) -> str:
    value = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        value = mutated(value, rng)
    path.write_text(json.dumps(value), errors="replace")
    return "json"


def mutated(value: Any, rng: random.Random) -> Any:
    """A json value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, rng.choice(("x", key + "_", "")): rng.choice(VALUES)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + rng.randrange(2) :]]
    return rng.choice(VALUES)


def mutated_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Tensors with one of another shape, type, value or name, or one that is missing."""
    tensors = {key: value.clone() for key, value in tensors.items()}
    if not tensors:
        return {"x": torch.zeros(2)}
    key = rng.choice(sorted(tensors))
    value = tensors.pop(key)
    kind = rng.randrange(8)
    if kind == 0:
        tensors[key] = value.half()
    elif kind == 1:
        tensors[key] = value.flatten()[:1] if value.ndim else torch.ones(3)
    elif kind == 2:
        tensors[key] = value.double() * rng.choice((1, 2.0))
    elif kind == 3:
        tensors[rng.choice(("x", key + "x", "é" * 99))] = value
    elif kind == 4:
        tensors[key] = value.to(torch.int64)
    elif kind < 7:
        flat = value.flatten().clone()
        if flat.numel() and flat.is_floating_point():
            most = torch.finfo(flat.dtype).max  # torch refuses to write what a type can't hold
            number = float(rng.choice(NUMBERS))
            flat[rng.randrange(len(flat))] = (
                number if not most < abs(number) < math.inf else math.copysign(most, number)
            )
        tensors[key] = flat.reshape(value.shape)
    return tensors


def _tensors(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        header = json.dumps(mutated(json.loads(content[8 : 8 + length]), rng)).encode(errors="replace")
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        return "safetensors header"
    if rng.random() < 0.1:
        path.write_bytes(rng.choice((2**63, 2**40, 10**8, 7)).to_bytes(8, "little") + content[8:])
        return "safetensors length"
    entries = json.loads(content[8 : 8 + length]).get("__metadata__")
    path.write_bytes(save(mutated_tensors(load(content), rng), entries))
    return "tensors"


def _array(path: Path, rng: random.Random) -> str:
    value = np.load(path)
    kind = rng.randrange(6)
    if kind == 0:
        value = value[..., : rng.randrange(value.shape[-1])]
    elif kind == 1:
        value = value[: rng.randrange(len(value))]
    elif kind == 2:
        value = value.astype(rng.choice(["f2", "f8", "i4", "c8", "S3", "?", "M8[s]"]))
    elif kind == 3:
        value = value.reshape(-1)
    elif kind == 4:
        value = np.array({"surface_points": value, "x": [None]}, dtype=object)
    else:
        value = value.copy()
        value.reshape(-1)[rng.randrange(value.size)] = rng.choice([n for n in NUMBERS if n != 10**30])
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    content = buffer.getvalue()
    if rng.random() < 0.2:
        content = content.replace(b"), }", b"99999999), }")[: len(content)]
    path.write_bytes(content)
    return "array"


def _picture(path: Path, rng: random.Random) -> str:
    picture = Image.open(path)
    picture.load()
    size = rng.choice(((1, 1), (1, 3000), (picture.width + 1, picture.height), picture.size))
    mode = rng.choice(("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"))
    changed = picture.resize(size, Image.Resampling.NEAREST).convert("RGB").convert(mode if mode != "LA" else "L")
    changed.save(path, "TIFF" if mode == "CMYK" else "PNG")
    if rng.random() < 0.3:  # a size that the file does not have, beyond what anybody can hold
        content = bytearray(path.read_bytes())
        content[16:24] = rng.choice((2**31 - 1, 10**5, 0)).to_bytes(4, "big") * 2
        path.write_bytes(content)
    return f"picture {mode}"

"""Options of the commands: one frozen dataclass per command, filled from a YAML file and from flags; flags win.

A flag has the name of its field. Unknown keys and wrong types are errors that name the file, the key and the nearest
known key: three training configs in the wild misspell a key, and nobody was told.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")


def option(default: Any, help: str, choices: Sequence[str] | None = None, alters_run: bool = True) -> Any:
    """A dataclass field with its help text.

    Args:
        alters_run: whether another value makes another training run (so that resuming with it is an error).
    """
    metadata = {"help": help, "choices": choices, "alters_run": alters_run}
    return field(default=default, metadata=metadata)


def _kind(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, optional?, list?) of a field's annotation: int, str | None, tuple[str, ...] | None, ..."""
    optional = isinstance(annotation, types.UnionType)
    if optional:
        (annotation,) = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], optional, True
    return annotation, optional, False


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """A YAML value as the field's type. Raises ValueError naming `where`, what was found and what was expected."""
    kind, optional, many = _kind(annotation)
    if value is None and optional:
        return None
    if many:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {value!r}, expected a list of {kind.__name__}")
        return tuple(_convert(item, kind, where) for item in value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where} is a number of {len(str(value))} digits, which is too large")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, expected a finite number")
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}), expected {kind.__name__}")
    return value


def nearest(key: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the known key that is most alike, or nothing when none is."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_mapping(cls: type[Options], values: Mapping[str, Any], source: str) -> Options:
    """Build options from a mapping.

    Raises:
        ValueError: an unknown key, a wrong type or a value that is not allowed; `source` is named.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    converted = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), list(fields))}")
        converted[key] = _convert(value, hints[key], f"{source}: {key}")
        _check_choice(fields[key], converted[key], f"{source}: {key}")
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_choice(entry: dataclasses.Field, value: Any, where: str) -> None:
    choices = entry.metadata.get("choices")
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where} is {value!r}, expected one of {', '.join(choices)}{nearest(str(value), choices)}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML file of options. Raises ValueError naming the file for anything else."""
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, expected 'key: value' lines")
    return values


def write_yaml(path: str | Path, options: Any) -> None:
    """Write resolved options as YAML that `parse` reads back."""
    import yaml

    from .files import write_bytes

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())


class _Parser(argparse.ArgumentParser):
    """Errors are one line; argparse would print the usage of fifty flags above it."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def build_parser(cls: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with `--config` and one flag per field of a dataclass."""
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the options below; flags override it")
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        kind, _, many = _kind(hints[entry.name])
        default = entry.default if entry.default is not MISSING else None
        text = f"{entry.metadata.get('help', '')} (default: {default})".replace("%", "%%")
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings.update(type=kind, metavar=kind.__name__.upper(), choices=entry.metadata.get("choices"))
            if settings["choices"]:
                settings.pop("metavar")
            if many:
                settings["nargs"] = "+"
        parser.add_argument(f"--{entry.name}", **settings)
    return parser


def parse(cls: type[Options], arguments: Sequence[str] | None = None, description: str = "") -> Options:
    """Options from `--config FILE` and flags; flags win. A class with `presets` may name one, which both override.

    Unusable values end the program with exit code 2 and one line on standard error, as argparse does.
    """
    parser = build_parser(cls, description)
    known, unknown = parser.parse_known_args(arguments)
    flags = vars(known)
    config = flags.pop("config", None)
    if unknown:
        names = [f"--{f.name}" for f in dataclasses.fields(cls)]
        parser.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], names)}")
    try:
        values = read_yaml(config) if config else {}
        from_mapping(cls, values, str(config))  # so that an error in the file names the file
        given = from_mapping(cls, {**values, **flags}, "command line")
        preset = getattr(cls, "presets", {}).get(getattr(given, "preset", None), {})
        return from_mapping(cls, {**preset, **values, **flags}, "command line")
    except ValueError as error:
        parser.error(str(error))


def changed_keys(before: Mapping[str, Any], after: Any) -> list[str]:
    """'key: old -> new' for every option that alters the run and differs from a saved run's options."""
    lines = []
    for entry in dataclasses.fields(after):
        if not entry.metadata.get("alters_run", True):
            continue
        new = getattr(after, entry.name)
        new = list(new) if isinstance(new, tuple) else new
        old = before.get(entry.name, entry.default)
        old = list(old) if isinstance(old, tuple) else old
        if old != new:
            lines.append(f"{entry.name}: {old} -> {new}")
    return lines

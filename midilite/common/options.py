"""Options of the commands: one frozen dataclass per command, filled from a YAML file and from flags; flags win.

A flag has the name of its field. What an option may be stands beside its default, in `option`, and is checked in one
place (`Options.__post_init__`), whether the value comes from a file, a flag or Python. Unknown keys and unusable values
are errors that name the file, the key, what was found and what was expected: three training configs in the wild
misspell a key, and nobody was told.

Spellings of earlier versions go on working (`Old`), with a line that says what stands in their place.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    group: str = "options",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    switch: tuple[str, str] | None = None,
    positional: bool = False,
    required: str | None = None,
    alters_run: bool = True,
) -> Any:
    """A dataclass field with its help text and what it may be.

    Args:
        choices: the values that are allowed.
        group: the heading that it stands under in `--help`.
        least, most: bounds that are allowed themselves; of each value, where there are several.
        above, below: bounds that are not.
        switch: for an option with choices: what `false` and `true` mean; the flag alone means the second.
        positional: whether the command line gives it without a flag.
        required: on the command line, what has to be given.
        alters_run: whether another value makes another training run (so that resuming with it is an error).
    """
    metadata = {
        "help": help, "choices": choices, "group": group, "bounds": (least, most, above, below), "switch": switch,
        "positional": positional, "required": required, "alters_run": alters_run,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Old:
    """An option that documentation or saved runs of earlier versions have.

    Attributes:
        name: how it was called.
        kind: its type, for the command line; with `many`, several of them.
        note: what is said when somebody uses it.
        as_now: value -> options of today; {} when there is nothing left to choose.
    """

    name: str
    kind: type
    note: str
    as_now: Callable[[Any], Mapping[str, Any]]
    many: bool = False


def renamed(name: str, new: str, kind: type, many: bool = False) -> Old:
    """An option that has another name now."""
    return Old(name, kind, f"is called --{new} now", lambda value: {new: value}, many)


def gone(name: str, kind: type, note: str) -> Old:
    """An option that is no choice any more; whatever its value is, it is passed over."""
    return Old(name, kind, note, lambda value: {})


class Options:
    """The base of a command's frozen dataclass of options.

    Raises:
        ValueError: a value has the wrong type or is not allowed; the option, what was found and what was expected are
            named.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    old_spellings: ClassVar[Sequence[Old]] = ()

    def __post_init__(self) -> None:
        for name in _entries(type(self)):
            object.__setattr__(self, name, _checked(type(self), name, getattr(self, name), name))
        self.check_together()

    def check_together(self) -> None:
        """Raise ValueError where options that are fine alone do not fit each other."""


Chosen = TypeVar("Chosen", bound=Options)


# ------------------------------------------------------------------------------------------------------ single values


@dataclass(frozen=True)
class _Entry:
    """A field with its annotation taken apart: int, str | None, tuple[str, ...] | None, tuple[float, float], ..."""

    field: dataclasses.Field
    kind: type
    optional: bool
    many: bool
    count: int | None

    def __getattr__(self, name: str) -> Any:
        return self.field.metadata.get(name)


@functools.lru_cache(maxsize=64)
def _entries(cls: type) -> dict[str, _Entry]:
    hints = typing.get_type_hints(cls)
    return {entry.name: _entry(entry, hints[entry.name]) for entry in dataclasses.fields(cls)}


def _entry(entry: dataclasses.Field, annotation: Any) -> _Entry:
    optional = isinstance(annotation, types.UnionType)
    if optional:
        (annotation,) = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if typing.get_origin(annotation) is not tuple:
        return _Entry(entry, annotation, optional, False, None)
    kinds = typing.get_args(annotation)
    return _Entry(entry, kinds[0], optional, True, None if kinds[-1] is Ellipsis else len(kinds))


def _checked(cls: type, name: str, value: Any, where: str) -> Any:
    """A value as the option's type. Raises ValueError naming `where`, what was found and what was expected."""
    entry = _entries(cls)[name]
    if entry.switch and isinstance(value, bool):
        value = entry.switch[value]
    if value is None and entry.optional:
        return None
    if not entry.many:
        value = _convert(value, entry.kind, where)
    elif not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {value!r}, expected a list of {entry.kind.__name__}")
    else:
        value = tuple(_convert(item, entry.kind, where) for item in value)
        if entry.count is not None and len(value) != entry.count:
            raise ValueError(f"{where} is {list(value)}, expected {entry.count} values")
    for single in value if entry.many else (value,):
        _check_bounds(entry, single, where)
    if entry.choices and value not in entry.choices:
        expected = f"expected one of {', '.join(entry.choices)}{nearest(str(value), entry.choices)}"
        raise ValueError(f"{where} is {value!r}, {expected}")
    return value


def _convert(value: Any, kind: type, where: str) -> Any:
    """One value as a type; harmless differences (1 for 1.0, a path for a string) are taken."""
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
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}), expected {kind.__name__}")
    return value


def _check_bounds(entry: _Entry, value: Any, where: str) -> None:
    least, most, above, below = entry.bounds or (None,) * 4
    fits = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if fits:
        return
    low = f"at least {least:g}" if least is not None else f"more than {above:g}" if above is not None else ""
    high = f"at most {most:g}" if most is not None else f"less than {below:g}" if below is not None else ""
    raise ValueError(f"{where} is {value}, expected {' and '.join(filter(None, (low, high)))}")


def nearest(key: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the known key that is most alike, or nothing when none is."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ------------------------------------------------------------------------------------------------------ many at once


def from_mapping(cls: type[Chosen], values: Mapping[str, Any], source: str) -> Chosen:
    """Build options from a mapping.

    Raises:
        ValueError: an unknown key, a wrong type or a value that is not allowed; `source` is named.
    """
    values = _known(cls, modernised(cls, values), source)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _known(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values, each checked by itself."""
    entries = _entries(cls)
    for key in values:
        if key not in entries:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(str(key), list(entries))}")
    return {key: _checked(cls, key, value, f"{source}: {key}") for key, value in values.items()}


def modernised(
    cls: type[Options], values: Mapping[str, Any], say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The values with old spellings replaced; `say` gets a line about each, by default on standard error."""
    say = say or (lambda text: print(text, file=sys.stderr))
    old = {entry.name: entry for entry in cls.old_spellings}
    now = {key: value for key, value in values.items() if key not in old}
    for key in values:
        if key in old:
            say(f"note: {key} {old[key].note}")
            now |= old[key].as_now(values[key])
    return now


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


# --------------------------------------------------------------------------------------------------- the command line


EXIT_CODES = (
    "Exit code: 0 done; 1 data, model, memory or disk can't be used; 2 unusable options; 130 ended by ctrl-C, 143 by "
    "SIGTERM."
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line; argparse would print the usage of fifty flags above it."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")


def build_parser(cls: type[Options], description: str = "", prog: str | None = None) -> argparse.ArgumentParser:
    """An argument parser with `--config` and one flag per field of a dataclass."""
    usage = "%(prog)s [--config FILE] [options]"  # argparse would list all of them
    parser = _Parser(prog=prog, usage=usage, description=description, epilog=EXIT_CODES, allow_abbrev=False)
    _add_options(parser, cls)
    return parser


def _add_options(parser: argparse.ArgumentParser, cls: type[Options]) -> None:
    parser.add_argument("--config", help="YAML file with any of the options below; flags override it")
    groups: dict[str, Any] = {"options": parser}
    for name, entry in _entries(cls).items():
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        _add_option(groups[entry.group], name, entry)
    for old in cls.old_spellings:
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        more = {"action": argparse.BooleanOptionalAction} if old.kind is bool else {"type": old.kind}
        parser.add_argument(f"--{old.name}", **hidden, **more, **({"nargs": "+"} if old.many else {}))


def _add_option(group: Any, name: str, entry: _Entry) -> None:
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(entry)}
    if entry.kind is bool:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **settings)
        return
    settings |= {"type": entry.kind, "choices": entry.choices}
    if entry.many:
        settings["nargs"] = entry.count or "+"
    if not entry.choices and not entry.positional:
        settings["metavar"] = entry.kind.__name__.upper()
    if entry.positional:
        settings.pop("default")
    if entry.switch:
        settings |= {"nargs": "?", "const": entry.switch[1]}
        off = {"dest": name, "action": "store_const", "const": entry.switch[0]}
        group.add_argument(f"--no-{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **off)
    group.add_argument(name if entry.positional else f"--{name}", **settings)


def _help(entry: _Entry) -> str:
    """The text, and the default where the text does not say what happens without the option."""
    text, default = entry.help, entry.field.default
    if default not in (None, False, MISSING) and not entry.positional and "(default" not in text:
        shown = " ".join(map(str, default)) if entry.many else "on" if default is True else default
        text = f"{text} (default: {shown})"
    return text.replace("%", "%%")


def parse(
    cls: type[Chosen], arguments: Sequence[str] | None = None, description: str = "", prog: str | None = None
) -> Chosen:
    """Options from `--config FILE` and flags; flags win. A class with `presets` may name one, which both override.

    Unusable values end the program with exit code 2 and one line on standard error, as argparse does.
    """
    parser = build_parser(cls, description, prog)
    known, unknown = parser.parse_known_args(arguments)
    return _resolved(cls, parser, vars(known), unknown)


def parse_command(
    commands: Mapping[str, type[Options]],
    arguments: Sequence[str] | None = None,
    description: str = "",
    prog: str | None = None,
) -> tuple[str, Options]:
    """(name, options) of one of several subcommands; their help is the first line of their class's docstring."""
    parser = _Parser(prog=prog, description=description, epilog=EXIT_CODES, allow_abbrev=False)
    parts = parser.add_subparsers(dest="command", required=True)
    for name, cls in commands.items():
        text = (cls.__doc__ or "").splitlines()[0]
        _add_options(parts.add_parser(name, help=text, description=text, allow_abbrev=False), cls)
    known, unknown = parser.parse_known_args(arguments)
    flags = vars(known)
    name = flags.pop("command")
    return name, _resolved(commands[name], parser, flags, unknown)


def _resolved(
    cls: type[Chosen], parser: argparse.ArgumentParser, flags: dict[str, Any], unknown: Sequence[str]
) -> Chosen:
    config = flags.pop("config", None)
    if unknown:
        names = [f"--{name}" for name in _entries(cls)]
        parser.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], names)}")
    try:
        values = _known(cls, modernised(cls, read_yaml(config)), config) if config else {}
        flags = _known(cls, modernised(cls, flags), "command line")
        given = {**values, **flags}
        preset = cls.presets.get(given.get("preset"), {})
        source = f"{config} and flags" if config else "command line"
        options = from_mapping(cls, {**preset, **given}, source)
        for name, entry in _entries(cls).items():
            if entry.required and getattr(options, name) is None:
                raise ValueError(f"{name} is missing: pass --{name}, {entry.required}")
    except ValueError as error:
        parser.error(str(error))
    return options


def changed_keys(before: Mapping[str, Any], after: Options) -> list[str]:
    """'key: old -> new' for every option that alters the run and differs from a saved run's options."""
    before = modernised(type(after), before, say=lambda text: None)
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

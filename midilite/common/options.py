"""Options of the commands: one frozen dataclass per command, filled from a YAML file and from flags (command_line.py).

A flag has the name of its field. What an option may be stands beside its default, in `option`, and is checked in one
place (`Options.__post_init__`), whether the value comes from a file, a flag or Python. Unknown keys and unusable values
are errors that name the file, the key, what was found and what was expected: three training configs in the wild
misspell a key, and nobody was told.

Spellings of earlier versions go on working (`Old`), with a line that says what stands in their place.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from . import terminal
from .overwriting import refuse_overwriting


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
    reads: bool = False,
    writes: bool = False,
    words: Sequence[str] = (),
    check: Callable[[Any, str], None] | None = None,
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
        words: texts that may stand in a number's place.
        check: called with each value and what to call it; raises ValueError for one that can't be.
        reads, writes: whether it names files or folders that are read, or a file that is written.
    """
    metadata = {
        "help": help, "choices": choices, "group": group, "bounds": (least, most, above, below), "switch": switch,
        "positional": positional, "required": required, "alters_run": alters_run, "reads": reads, "writes": writes,
        "check": check, "words": tuple(words),
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
        for name in entries_of(type(self)):
            object.__setattr__(self, name, _checked(type(self), name, getattr(self, name), name))
        self.check_together()
        refuse_overwriting(self.outputs(), self.inputs())

    def check_together(self) -> None:
        """Raise ValueError where options that are fine alone do not fit each other; a class with such overrides it."""

    def inputs(self) -> list[tuple[str, str]]:
        """(option, path) of every file and folder that is read."""
        return self._paths("reads")

    @property
    def output_folder(self) -> Path | None:
        """Where the command writes, if it does."""
        if folder := getattr(self, "output_dir", None):
            return Path(folder)
        return next((Path(path).parent for _, path in self.outputs()), None)

    def outputs(self) -> list[tuple[str, str]]:
        """(option, path) of every file that is written; commands add those whose names follow from others."""
        return self._paths("writes")

    def _paths(self, kind: str) -> list[tuple[str, str]]:
        found = []
        for name, entry in entries_of(type(self)).items():
            value = getattr(self, name)
            if entry.field.metadata.get(kind) and value is not None:
                found += [(name, path) for path in (value if isinstance(value, tuple) else (value,))]
        return found


Chosen = TypeVar("Chosen", bound=Options)


# ------------------------------------------------------------------------------------------------------ single values


@dataclass(frozen=True)
class Entry:
    """A field with its annotation taken apart: int, str | None, tuple[str, ...], tuple[float, float], ...

    What `option` was told about it are attributes, too.

    Attributes:
        kind: of the value, or of each where there are several.
        optional: whether it may be None.
        many: whether there are several values; `count` of them, where that is fixed.
        or_one: whether one value stands for itself and several are a tuple, as of str | tuple[str, ...].
    """

    field: dataclasses.Field
    kind: type
    optional: bool
    many: bool
    count: int | None
    or_one: bool = False

    def is_none(self, value: Any) -> bool:
        """Whether a text, or a list of only that, is the word for no value: `none`, where that is no choice itself."""
        value = value[0] if self.many and isinstance(value, (list, tuple)) and len(value) == 1 else value
        word = isinstance(value, str) and value.lower() == "none"
        return word and self.optional and not self.positional and value not in (self.choices or ())

    def __getattr__(self, name: str) -> Any:
        return self.field.metadata.get(name)


@functools.lru_cache(maxsize=64)
def entries_of(cls: type) -> dict[str, Entry]:
    """The options of a class, by name."""
    hints = typing.get_type_hints(cls)
    return {entry.name: _entry(entry, hints[entry.name]) for entry in dataclasses.fields(cls)}


def _entry(entry: dataclasses.Field, annotation: Any) -> Entry:
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    optional, kinds = types.NoneType in kinds, [kind for kind in kinds if kind is not types.NoneType]
    several = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    annotation, or_one = (several or kinds)[0], bool(several) and len(kinds) > 1
    if typing.get_origin(annotation) is not tuple:
        return Entry(entry, annotation, optional, False, None)
    kinds = typing.get_args(annotation)
    return Entry(entry, kinds[0], optional, True, None if kinds[-1] is Ellipsis else len(kinds), or_one)


def _checked(cls: type, name: str, value: Any, where: str) -> Any:
    """A value as the option's type. Raises ValueError naming `where`, what was found and what was expected."""
    entry = entries_of(cls)[name]
    if entry.switch and isinstance(value, bool):
        value = entry.switch[value]
    if entry.optional and (value is None or entry.is_none(value)):
        return None
    if isinstance(value, str) and value in (entry.words or ()):
        return value
    if entry.or_one and isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    if not entry.many or (entry.or_one and not isinstance(value, (list, tuple))):
        value = _convert(value, entry.kind, where)
    elif not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {_quoted(value)}, expected a list of {entry.kind.__name__}")
    else:
        value = tuple(_convert(item, entry.kind, where) for item in value)
        if entry.count is not None and len(value) != entry.count:
            raise ValueError(f"{where} is {list(value)}, expected {entry.count} values")
    for single in value if isinstance(value, tuple) else (value,):
        _check_bounds(entry, single, where)
        if entry.check:
            entry.check(single, where)
    if entry.choices and value not in entry.choices:
        expected = f"expected one of {', '.join(entry.choices)}{nearest(str(value), entry.choices)}"
        raise ValueError(f"{where} is {_quoted(value)}, {expected}")
    return value


def _convert(value: Any, kind: type, where: str) -> Any:
    """One value as a type; harmless differences (1 for 1.0, a path for a string) are taken."""
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, int) and abs(value) >= 2**63:
        digits = math.ceil(value.bit_length() * math.log10(2))  # Python refuses to write very long ones
        raise ValueError(f"{where} is a number of about {digits} digits, which is too large")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, expected a finite number")
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {_quoted(value)} ({type(value).__name__}), expected {kind.__name__}")
    return value


def _quoted(value: Any) -> str:
    """A value in a message: the beginning of it, when it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python refuses to write very long numbers
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_bounds(entry: Entry, value: Any, where: str) -> None:
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
    values = checked_values(cls, modernised(cls, values), source)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def checked_values(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values, each checked by itself. Raises ValueError naming `source` and the key."""
    entries = entries_of(cls)
    for key in values:
        if key not in entries:
            raise ValueError(f"{source}: unknown key {_quoted(key)}{nearest(str(key)[:80], list(entries))}")
    return {key: _checked(cls, key, value, f"{source}: {key}") for key, value in values.items()}


def modernised(
    cls: type[Options], values: Mapping[str, Any], say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The values with old spellings replaced; `say` gets a line about each, by default on standard error."""
    say = say or terminal.say
    old = {entry.name: entry for entry in cls.old_spellings}
    now = {key: value for key, value in values.items() if key not in old}
    for key in values:
        if key in old:
            say(f"note: {key} {old[key].note}")
            now |= old[key].as_now(values[key])
    return now


def yaml_text(options: Any) -> bytes:
    """Resolved options as the bytes of a YAML file that `parse` reads back."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    return yaml.safe_dump(values, sort_keys=False).encode()


def changed_keys(before: Mapping[str, Any], after: Options, paths: bool = True) -> list[str]:
    """'key: old -> new' for every option that alters the run and differs from a saved run's options.

    Args:
        paths: whether to compare options that name what is read; a place that is written differently is the same.
    """
    before = modernised(type(after), before, say=lambda text: None)
    lines = []
    for entry in dataclasses.fields(after):
        is_path = entry.metadata.get("reads")
        if not entry.metadata.get("alters_run", True) or (is_path and not paths):
            continue
        new = getattr(after, entry.name)
        new = list(new) if isinstance(new, tuple) else new
        old = before.get(entry.name, entry.default)
        old = list(old) if isinstance(old, tuple) else old
        if old != new and not (is_path and _same_path(old, new)):
            lines.append(f"{entry.name}: {_shown(old)} -> {_shown(new)}")
    return lines


def _same_path(old: Any, new: Any) -> bool:
    if not isinstance(old, str) or not isinstance(new, str) or "\0" in old:
        return False
    return os.path.realpath(old) == os.path.realpath(new)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

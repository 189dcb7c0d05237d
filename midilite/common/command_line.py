"""A command's options from its flags and its YAML file; what they may be is said in options.py."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from .options import Chosen, Entry, Options, checked_values, entries_of, from_mapping, modernised, nearest
from .overwriting import refuse_overwriting
from .terminal import say
from .yaml_file import read_yaml

EXIT_CODES = (
    "Exit code: 0 done; 1 data, model, memory or disk can't be used; 2 unusable options; 70 an error of midilite "
    "itself, see error.log; 130 ended by ctrl-C, 143 by SIGTERM."
)


class _Parser(argparse.ArgumentParser):
    """Errors are one line; argparse would print the usage of fifty flags above it."""

    def error(self, message: str) -> typing.NoReturn:
        say(f"{self.prog}: error: {message} (--help lists all options)")
        self.exit(2)


def build_parser(cls: type[Options], description: str = "", prog: str | None = None) -> argparse.ArgumentParser:
    """An argument parser with `--config` and one flag per field of a dataclass."""
    usage = "%(prog)s [--config FILE] [options]"  # argparse would list all of them
    parser = _Parser(prog=prog, usage=usage, description=description, epilog=EXIT_CODES, allow_abbrev=False)
    _add_options(parser, cls)
    return parser


def _add_options(parser: argparse.ArgumentParser, cls: type[Options]) -> None:
    parser.add_argument("--config", help="YAML file with any of the options below; flags override it")
    groups: dict[str, Any] = {"options": parser}
    for name, entry in entries_of(cls).items():
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        _add_option(groups[entry.group], name, entry)
    for old in cls.old_spellings:
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        more = {"action": argparse.BooleanOptionalAction} if old.kind is bool else {"type": old.kind}
        parser.add_argument(f"--{old.name}", **hidden, **more, **({"nargs": "+"} if old.many else {}))


def _add_option(group: Any, name: str, entry: Entry) -> None:
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(entry)}
    if entry.kind is bool:
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **settings)
        return
    settings |= {"type": _reader(entry), "choices": entry.choices and _choices(entry)}
    if entry.many:
        settings["nargs"] = entry.count or "+"
    if not entry.positional:
        settings["metavar"] = f"{{{','.join(entry.choices)}}}" if entry.choices else entry.kind.__name__.upper()
    if entry.positional:
        settings.pop("default")
    if entry.switch:
        settings |= {"nargs": "?", "const": entry.switch[1]}
        off = {"dest": name, "action": "store_const", "const": entry.switch[0]}
        group.add_argument(f"--no-{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **off)
    group.add_argument(name if entry.positional else f"--{name}", **settings)


def _reader(entry: Entry) -> Callable[[str], Any]:
    """What makes a value of a word; `none` stays a word, and is understood where values are checked."""

    def read(word: str) -> Any:
        return word if entry.is_none(word) or word in (entry.words or ()) else entry.kind(word)

    read.__name__ = entry.kind.__name__  # argparse names it in its errors
    return read


def _choices(entry: Entry) -> Sequence[str]:
    return (*entry.choices, "none") if entry.is_none("none") else entry.choices


def _help(entry: Entry) -> str:
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
        names = [f"--{name}" for name in entries_of(cls)]
        parser.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], names)}")
    try:
        values = checked_values(cls, modernised(cls, read_yaml(config)), config) if config else {}
        flags = checked_values(cls, modernised(cls, flags), "command line")
        given = {**values, **flags}
        preset = cls.presets.get(given.get("preset"), {})
        source = f"{config} and flags" if config else "command line"
        options = from_mapping(cls, {**preset, **given}, source)
        for name, entry in entries_of(cls).items():
            if entry.required and getattr(options, name) is None:
                raise ValueError(f"{name} is missing: pass --{name}, {entry.required}")
        refuse_overwriting(options.outputs(), [("config", config)] if config else [])
    except ValueError as error:
        parser.error(str(error))
    return options

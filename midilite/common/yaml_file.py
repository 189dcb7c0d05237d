"""Reading a YAML file of options that anybody may have made: flat, small, and every key once.

A YAML file can refer to what stands in it already (aliases), and a reference to references grows to billions of values
in ten lines; none of it is of use for options. PyYAML's safe loader makes no objects of a file's choosing, but it takes
aliases, any depth, and the last of several equal keys.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .files import read_text
from .seeds import name_bytes

MOST_BYTES = 2**18
_DEPTH = 6  # an option may be a list; what is deeper is refused by name, not by PyYAML's recursion


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML file of options.

    Raises:
        ValueError: it is missing, too large or no YAML; it has aliases, nests deeply or repeats a key; or it is no
            'key: value' lines. The message names the file.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.load(read_text(path, MOST_BYTES), _loader())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError, OverflowError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path}: is not valid YAML ({' '.join(str(error).split())[:400]})") from error
    except ValueError as error:  # a day 99, a number of 5,000 digits; or from read_text, which names the file
        told = str(error).startswith(str(path))
        raise error if told else ValueError(f"{path}: is not valid YAML ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, expected 'key: value' lines")
    return {key: _as_argument(value) for key, value in values.items()}


def _as_argument(value: Any) -> Any:
    """A value as the command line would give it: where the locale is not UTF-8, names of files are spelt otherwise."""
    if isinstance(value, list):
        return [_as_argument(item) for item in value]
    if not isinstance(value, str) or value.isascii() or sys.getfilesystemencoding() == "utf-8":
        return value
    return os.fsdecode(name_bytes(value))


def _loader() -> type:
    """PyYAML's safe loader, and what it takes too much of refused. (yaml is imported only where it is needed.)"""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*{self.peek_event().anchor}) are not read")
            self.depth += 1
            if self.depth > _DEPTH:
                raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: nests deeper than options do")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen if isinstance(key.value, str) else False:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value!r} is there twice")
                seen |= {key.value} if isinstance(key.value, str) else set()
            return super().construct_mapping(node, deep)

    return Loader

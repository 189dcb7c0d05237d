"""A pickle's opcodes, followed without an unpickler: nothing that a file names is ever imported or called.

The standard library can list opcodes without doing anything (`pickletools.genops`). A small machine follows them on a
stack of plain values: it knows lists, dicts, tuples, text and numbers, and the few names that a kind of file needs,
each of which stands for a function of ours. Anything else is refused, and nothing costs more than the file's own size.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_STEPS = 1_000_000  # of one pickle; a second or two
_MARK = object()


@dataclass(frozen=True)
class Name:
    """A global that the pickle names: a word, never the thing."""

    word: str


@dataclass(frozen=True)
class Dialect:
    """What pickles of one kind of file may say.

    Attributes:
        names: "module name" of each global that is known -> our word for it.
        calls: word -> what calling it gives; a word without one may be named but not called.
        build: (target, state), for what the pickle gives a state to; raises ValueError for what may have none.
        persistent: what a persistent id stands for; None where there may be none.
        read: for messages: what is read.
    """

    names: Mapping[str, str]
    calls: Mapping[str, Callable[..., Any]]
    build: Callable[[Any, Any], None]
    read: str
    persistent: Callable[[Any], Any] | None = None


class ForeignNameError(ValueError):
    """The pickle asks for something that its kind of file does not need; `wanted` is "module.name"."""

    def __init__(self, wanted: str, read: str) -> None:
        super().__init__(f"the pickle asks for {wanted}; only {read} are read")
        self.wanted = wanted


class Machine:
    """Follows a pickle's opcodes on a stack of plain values."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """What is on top at the end."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > MOST_STEPS:
                raise ValueError(f"the pickle has more than {MOST_STEPS:,} steps")
            if opcode.name == "STOP":
                return self.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def pop(self) -> Any:
        """The topmost value."""
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the pickle takes more than it has put")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("the pickle lacks a mark")
        self.stack.pop()
        return values[::-1]

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle uses {name}; only {self.dialect.read} are read")

    def _memoize(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def _get(self, argument: Any) -> None:
        if argument not in self.memo:
            raise ValueError("the pickle recalls what it never stored")
        self.stack.append(self.memo[argument])

    def _tuple(self, count: int | None) -> None:
        values = self.pop_to_mark() if count is None else [self.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(values))

    def _append(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, list):
            raise ValueError("the pickle appends to what is no list")
        target.extend(values)
        self.stack.append(target)

    def _set(self, values: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(k, (str, int)) for k in values[::2]):
            raise ValueError("the pickle fills what is no dict with text as keys")
        target.update(zip(values[::2], values[1::2], strict=True))
        self.stack.append(target)

    def _dict(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self._set(values)

    def _global(self, argument: str) -> None:
        self.stack.append(self._named(*argument.split(" ", 1)))

    def _stack_global(self, argument: Any) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(self._named(module, name))

    def _reduce(self, argument: Any) -> None:
        arguments, function = self.pop(), self.pop()
        call = self.dialect.calls.get(function.word) if isinstance(function, Name) else None
        if call is None or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls what is no part of an array")
        self.stack.append(call(*arguments))

    def _build(self, argument: Any) -> None:
        state = self.pop()
        target = self.pop()
        self.dialect.build(target, state)
        self.stack.append(target)

    def _persistent(self, argument: Any) -> None:
        if self.dialect.persistent is None:
            raise ValueError("the pickle refers to what lies outside of it")
        self.stack.append(self.dialect.persistent(self.pop()))

    def _named(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):  # never into a message: it may be of any size
            raise ValueError("the pickle asks for something without a name")
        word = self.dialect.names.get(f"{module} {name}")
        if word is None:
            raise ForeignNameError(f"{module[:60]}.{name[:60]}", self.dialect.read)
        return Name(word)


_LITERALS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK,
}  # fmt: skip
_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._get),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine._dict(),
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "APPEND": lambda machine, _: machine._append([machine.pop()]),
    "APPENDS": lambda machine, _: machine._append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine.pop_to_mark()),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "BINPERSID": Machine._persistent,
    "BUILD": Machine._build,
}

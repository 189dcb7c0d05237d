"""Names of modules with marks, matched in time linear in the name: nothing that a file holds can hang a process.

Two small languages mean the same kind of thing, a set of strings without end that an automaton of a few hundred states
recognises:

- ours, for targets and tables (`config.py` says what it means): `*` for any characters, `8-12` for these numbers;
- the part of regular expressions that PEFT's `rank_pattern` and `alpha_pattern` need: letters, `.`, `\\d` and `\\w`,
  classes `[a-z0-9]`, groups `( | )`, and `* + ?` behind any of these. What backtracks or looks around (`{2,3}`,
  back references, look-ahead, flags) is refused by name.

Both are parsed into one tree, the tree becomes an automaton (Thompson 1968), and a string is read by keeping the set of
all states that it may be in, character by character. There is no backtracking. What follows on a set and a character is
remembered: an adapter can have a pattern for each of its modules, and every pattern meets every name.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

MOST_CHARACTERS = 400  # of a pattern; names of modules have at most some sixty
_MOST_KNOWN = 20_000  # remembered steps of one pattern
_MOST_NUMBERS = 1000  # in a range; no network here has as many blocks
_DIGITS, _WORD = frozenset(string.digits), frozenset(string.ascii_letters + string.digits + "_")
_ANY: frozenset[str] | None = None  # a step that takes any character


@dataclass(frozen=True, eq=False)
class Pattern:
    """An automaton. `steps[s]` are (characters or None for any, next state), `free[s]` states reached for nothing."""

    steps: list[list[tuple[frozenset[str] | None, int]]]
    free: list[list[int]]
    start: int
    end: int
    _known: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict)

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text is meant."""
        states = self._first
        for character in text:
            known = self._known.get((states, character))
            states = self._following(states, character) if known is None else known
        return self.end in states

    @cached_property
    def _first(self) -> frozenset[int]:
        return self._closed({self.start})

    def _following(self, states: frozenset[int], character: str) -> frozenset[int]:
        taken = {n for s in states for allowed, n in self.steps[s] if allowed is None or character in allowed}
        closed = self._closed(taken)
        if len(self._known) < _MOST_KNOWN:  # a hostile pattern has more sets than fit into memory
            self._known[states, character] = closed
        return closed

    def _closed(self, states: set[int]) -> frozenset[int]:
        found, todo = set(states), list(states)
        while todo:
            new = [n for n in self.free[todo.pop()] if n not in found]
            found.update(new)
            todo += new
        return frozenset(found)


class _Builder:
    """Adds states; every part is (first state, last state)."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[frozenset[str] | None, int]]] = []
        self.free: list[list[int]] = []

    def state(self) -> int:
        self.steps.append([])
        self.free.append([])
        return len(self.free) - 1

    def one(self, characters: frozenset[str] | None) -> tuple[int, int]:
        first, last = self.state(), self.state()
        self.steps[first].append((characters, last))
        return first, last

    def chain(self, parts: list[tuple[int, int]]) -> tuple[int, int]:
        first = last = self.state()
        for begin, end in parts:
            self.free[last].append(begin)
            last = end
        return first, last

    def either(self, parts: list[tuple[int, int]]) -> tuple[int, int]:
        first, last = self.state(), self.state()
        for begin, end in parts:
            self.free[first].append(begin)
            self.free[end].append(last)
        return first, last

    def repeated(self, part: tuple[int, int], mark: str) -> tuple[int, int]:
        """`*`, `+` or `?` behind a part."""
        first, last = self.state(), self.state()
        self.free[first].append(part[0])
        self.free[part[1]].append(last)
        if mark in "*?":
            self.free[first].append(last)
        if mark in "*+":
            self.free[part[1]].append(part[0])
        return first, last

    def word(self, text: str) -> tuple[int, int]:
        return self.chain([self.one(frozenset(c)) for c in text])

    def anything_before(self, part: tuple[int, int]) -> Pattern:
        """The finished automaton of `(.*\\.)?part`: a name means whatever ends with it after a dot."""
        outer = self.repeated(self.chain([self.repeated(self.one(_ANY), "*"), self.word(".")]), "?")
        return Pattern(self.steps, self.free, *self.chain([outer, part]))


# --- ours -------------------------------------------------------------------------------------------------------------


def is_range(component: str) -> bool:
    """Whether a component of a name has the form of a range, sensible or not."""
    low, _, high = component.partition("-")
    return low.isdecimal() and high.isdecimal()


def _number_range(component: str) -> tuple[int, int]:
    """(8, 12) for `8-12`. Raises ValueError for a senseless range."""
    low, _, high = component.partition("-")
    if len(low) > 9 or len(high) > 9 or not int(low) <= int(high) < int(low) + _MOST_NUMBERS:
        raise ValueError(f"{component} is no range; write it as 8-12, the smaller number first")
    return int(low), int(high)


@lru_cache(maxsize=1024)
def module_pattern(name: str) -> Pattern:
    """A name with `*` and ranges. Raises ValueError naming it for a senseless range or too long a name."""
    if len(name) > MOST_CHARACTERS:
        raise ValueError(f"LoRA name {name[:40]!r}... has {len(name)} characters, expected at most {MOST_CHARACTERS}")
    builder = _Builder()
    try:
        parts = [_component(builder, component) for component in name.split(".")]
    except ValueError as error:
        raise ValueError(f"LoRA name {name!r}: {error}") from None
    dotted = [parts[0]] + [p for part in parts[1:] for p in (builder.word("."), part)]
    return builder.anything_before(builder.chain(dotted))


def _component(builder: _Builder, component: str) -> tuple[int, int]:
    if is_range(component):
        first, last = _number_range(component)
        return builder.either([builder.word(str(n)) for n in range(first, last + 1)])
    pieces = [builder.word(piece) for piece in component.split("*")]
    stars = [builder.repeated(builder.one(_ANY), "*") for _ in pieces[1:]]
    return builder.chain(
        [pieces[0]] + [p for star, piece in zip(stars, pieces[1:], strict=True) for p in (star, piece)]
    )


# --- PEFT's -----------------------------------------------------------------------------------------------------------

_ESCAPED: dict[str, frozenset[str]] = {"d": _DIGITS, "w": _WORD}


class _Regex:
    """A recursive-descent parser of the part of regular expressions that is read."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.builder = text, 0, _Builder()

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self.at + 1}")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        character = self.peek()
        self.at += 1
        return character

    def whole(self) -> Pattern:
        part = self.alternatives(0)
        if self.at < len(self.text):
            raise self.fail("a ) without its (")
        return self.builder.anything_before(part)

    def alternatives(self, depth: int) -> tuple[int, int]:
        if depth > 20:
            raise self.fail("groups nested too deep")
        parts = [self.sequence(depth)]
        while self.peek() == "|":
            self.take()
            parts.append(self.sequence(depth))
        return parts[0] if len(parts) == 1 else self.builder.either(parts)

    def sequence(self, depth: int) -> tuple[int, int]:
        parts = []
        while self.peek() and self.peek() not in "|)":
            part = self.atom(depth)
            if self.peek() and self.peek() in "*+?":
                part = self.builder.repeated(part, self.take())
                if self.peek() == "?":  # prefers the shorter match, which is no matter when the whole has to match
                    self.take()
            parts.append(part)
        return self.builder.chain(parts)

    def atom(self, depth: int) -> tuple[int, int]:
        character = self.take()
        if character == "(":
            if self.text[self.at : self.at + 2] == "?:":
                self.at += 2
            elif self.peek() == "?":
                raise self.fail("a group with ?, of which only (?: ) is read,")
            part = self.alternatives(depth + 1)
            if self.take() != ")":
                raise self.fail("a ( without its )")
            return part
        if character in "^$":  # where the pattern begins and ends anyway
            whole = self.at == 1 if character == "^" else self.at == len(self.text)
            if not whole:
                raise self.fail(f"a {character} in the middle")
            return self.builder.chain([])
        if character in "*+?{":
            raise self.fail(f"a {character}, which is not read here,")
        return self.builder.one(self._characters(character))

    def _characters(self, character: str) -> frozenset[str] | None:
        if character == ".":
            return _ANY
        if character == "[":
            return self._class()
        return self._escaped() if character == "\\" else frozenset(character)

    def _escaped(self) -> frozenset[str]:
        character = self.take()
        if not character or character.isalnum() and character not in _ESCAPED:
            raise self.fail(f"a \\{character}, which is not read here,")
        return _ESCAPED.get(character, frozenset(character))

    def _class(self) -> frozenset[str]:
        found: set[str] = set()
        while self.peek() != "]":
            first = self.take()
            if not first:
                raise self.fail("a [ without its ]")
            if first == "^" and not found:
                raise self.fail("a [^ ], which is not read here,")
            if first == "\\":
                found |= self._escaped()
            elif self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.take()
                found.update(map(chr, range(ord(first), min(ord(self.take()), 0x7F) + 1)))
            else:
                found.add(first)
        self.take()
        return frozenset(found)


@lru_cache(maxsize=1024)
def peft_pattern(text: str) -> Pattern:
    """PEFT's rule: what matches the end of a path, after a dot. Raises ValueError for what is no pattern read here."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, expected at most {MOST_CHARACTERS}")
    return _Regex(text).whole()

"""Patterns of module names against Python's `re` as the slow and dangerous reference."""

import random
import re

import pytest

from midilite.lora.config import LoRAConfig, matches
from midilite.lora.patterns import module_pattern, peft_pattern

PATHS = [
    *(f"blocks.{b}.{a}.{p}" for b in (0, 8, 10, 12, 100) for a in ("attn1", "attn2_2") for p in ("to_q", "to_out.0")),
    "proj_in", "time_proj.linear_1", "myblocks.9.x", "a", "", "..", "blocks.8-12.x", "blöcke.3.to_q", "a\nb",
]  # fmt: skip


def by_regex(name: str, path: str) -> bool:
    """Our language as a regular expression, as it was before it had an automaton."""
    pieces = []
    for component in name.split("."):
        ends = re.fullmatch(r"(\d+)-(\d+)", component)
        numbers = "|".join(map(str, range(int(ends[1]), int(ends[2]) + 1))) if ends else None
        pieces.append(f"(?:{numbers})" if numbers else re.sub(r"(\\\*)+", ".*", re.escape(component)))
    return re.compile(r"(?:.*\.)?" + r"\.".join(pieces), re.DOTALL).fullmatch(path) is not None


def test_our_patterns_mean_what_they_meant():
    rng = random.Random(0)
    pieces = ["*", "blocks", "8-12", "attn*", "to_q", "*_2", "0", "a", "**", "", "x", "linear_1", "3-3", "*o*"]
    positive = 0
    for _ in range(3000):
        name = ".".join(rng.choice(pieces) for _ in range(rng.randint(1, 4)))
        for path in PATHS:
            assert module_pattern(name).fullmatch(path) == by_regex(name, path), (name, path)
            positive += by_regex(name, path)
    assert positive > 3000


def random_regex(rng: random.Random, depth: int = 0) -> str:
    """Of the part that PEFT's tables need."""
    atoms = ["a", "b", r"\.", ".", r"\d", "[ab]", "[0-9a]", r"\w", "_"]
    if depth < 2:
        atoms += [
            f"({random_regex(rng, depth + 1)})",
            f"(?:{random_regex(rng, depth + 1)}|{random_regex(rng, depth + 1)})",
        ]
    return "".join(rng.choice(atoms) + rng.choice(["", "", "*", "+", "?"]) for _ in range(rng.randint(1, 4)))


def test_regular_expressions_mean_what_they_mean_to_peft():
    rng = random.Random(1)
    positive = 0
    for _ in range(1500):
        pattern = random_regex(rng)
        for _ in range(12):  # of short names: re tries all ways to read one, which can be very many
            path = "".join(rng.choice("ab.1_") for _ in range(rng.randint(0, 4)))
            expected = re.match(rf"(.*\.)?({pattern})$", path) is not None
            assert peft_pattern(pattern).fullmatch(path) == expected, (pattern, path)
            positive += expected
    assert positive > 1500


WRITTEN = [r"blocks\.[0-9]+\.attn1\.to_q", r"^blocks.(8|9|1[0-2]).*\.to_q$", r".*to_out\.0", "to_q"]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write_is_read(pattern):
    for path in PATHS:
        assert peft_pattern(pattern).fullmatch(path) == (re.match(rf"(.*\.)?({pattern})$", path) is not None)


REFUSED = {
    r"(?x:(a+) *)": "a group with ?", r"(a)\1": r"a \\1", "a{2,3}": "a {", "(?=a)b": "a group with ?",
    "a(": r"a \( without", "a)": r"a \) without", "[a": r"a \[ without", "[^a]": r"a \[\^ \]", "*a": r"a \*",
    "a*+": r"a \+", "a$b": r"a \$ in the middle", "a" * 500: "500 characters", "a\\": r"a \\",
    "(" * 60 + ")" * 60: "nested too deep",
}  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:12])
def test_what_is_not_read_is_refused_with_its_place(pattern):
    """Past bug: a bare re.error, or a pattern that Python then could not stop matching."""
    with pytest.raises(ValueError, match=REFUSED[pattern]):
        peft_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*.*.*.*.*.*.*.*x", "(a|a)*b", "(a*)*(a*)*c", "((a?)+)+$"])
def test_no_pattern_takes_longer_than_name_times_pattern(pattern):
    """With backtracking the first of these would outlast the universe."""
    assert not peft_pattern(pattern).fullmatch("a" * 5000 + "!")
    assert not module_pattern("*a" * 60 + "x").fullmatch("a" * 5000)


def test_what_was_computed_once_is_remembered_within_bounds(monkeypatch):
    """Past bug: a file with a pattern for each module took many seconds, because every match computed its sets anew."""
    pattern = peft_pattern(r"blocks\.1[0-9]\.attn1\.(to_q|to_k)")
    assert [pattern.fullmatch(path) for path in PATHS].count(True) == 2
    known = len(pattern._known)
    monkeypatch.setattr(type(pattern), "_following", lambda *args: pytest.fail("computed again"))
    assert [pattern.fullmatch(path) for path in PATHS].count(True) == 2 and len(pattern._known) == known
    monkeypatch.undo()
    hostile = peft_pattern("(a|b)*a" + "(a|b)" * 14)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab") for _ in range(400))
        assert hostile.fullmatch(text) == (text[-15] == "a")
    assert len(hostile._known) <= 20_000


def test_tables_use_them():
    config = LoRAConfig(rank_pattern={"blocks.8-12.*": 32})
    assert config.rank_of("blocks.10.attn1.to_q") == 32 and config.rank_of("blocks.100.attn1.to_q") == 16
    with pytest.raises(ValueError, match=r"LoRA name 'blocks.12-8.\*': 12-8 is no range; write it as 8-12"):
        matches("blocks.9.attn1.to_q", "blocks.12-8.*")

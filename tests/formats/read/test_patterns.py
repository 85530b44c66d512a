"""Patterns of configurations: what Python's `re` says of any of them, within work that no pattern makes large."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Iterator

import pytest
from peft.utils.other import get_pattern_key

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read import patterns
from tpeft_deploy.formats.read.patterns import Endings, Patterns

ATOMS = [
    "a", "b", "q", "_", "0", ".", r"\.", r"\d", r"\w", r"\s", r"\W", r"\S", r"\D", "[ab]", "[^a.]", "[a-c0-9]", "é",
    "\u017f", r"[^\W\d]", "A", "k", "[é-ü]", r"\b", r"\B", "^", "$", r"\A", r"\Z", r"\-", r"\x61", "[]a]",
    "(?P<n>a)", "a)|(b",
]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{,2}", "*?", "+?", "{2,}"]
FLAGS = ["i", "a", "s", "m", "-i", "ai"]


def pattern(choose: random.Random, depth: int = 0) -> str:
    kind = choose.random()
    if depth > 4 or kind < 0.35:
        return choose.choice(ATOMS)

    def inner() -> str:
        return pattern(choose, depth + 1)

    if kind < 0.55:
        return inner() + inner()
    if kind < 0.7:
        return f"({choose.choice(['', '?:'])}{inner()}|{inner()})"
    if kind < 0.85:
        return f"(?:{inner()}){choose.choice(REPEATS)}"
    if kind < 0.95:
        return f"(?{choose.choice(['=', '!', '<=', '<!'])}{inner()})"
    return f"(?{choose.choice(FLAGS)}:{inner()})" if kind < 0.98 else f"{inner()}|{inner()}"


def names(choose: random.Random) -> list[str]:
    return [
        "".join(choose.choices("aabbq_01..A-kKé \u017f\x1c\u0663\u212a", k=choose.randint(0, 9))) for _ in range(12)
    ]


def asked(*texts: str, whole: bool = False) -> Patterns:
    return Patterns(texts, whole=whole, field="alpha_pattern", source="the test's")


def compiled(text: str) -> re.Pattern[str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return re.compile(text)
        except re.error:
            return None


@pytest.fixture(autouse=True)
def _odd_sets_of_letters_are_no_matter() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("whole", [True, False])
def test_any_pattern_matches_what_re_matches(whole: bool) -> None:
    hits = refused = 0
    for seed in range(600):
        choose = random.Random(seed)
        text = pattern(choose)
        expected = compiled(text if whole else rf"(.*\.)?({text})$")
        own = asked(text, whole=whole)
        if expected is None:
            refused += 1
            with pytest.raises(FormatError, match="expected regular expressions"):
                own.first("a")
            continue
        for name in names(choose):
            want = (expected.fullmatch(name) if whole else expected.match(name)) is not None
            assert (own.first(name) is not None) == want, (seed, text, name)
            hits += want
    assert hits > 300
    assert refused < 100


def test_the_first_of_several_is_that_of_peft() -> None:
    found = 0
    for seed in range(400):
        choose = random.Random(seed)
        several = [choose.choice(["a", "a.b", r"a\.b", "^b", "q_.", "b$", r"\w+", pattern(choose)]) for _ in range(6)]
        several = [text for text in dict.fromkeys(several) if compiled(rf"(.*\.)?({text})$")]
        own = asked(*several)
        for name in [*names(choose), "q.a.b", "a.b", "b", "x.q_0"]:
            first = get_pattern_key(several, name)
            want = first if any(re.match(rf"(.*\.)?({text})$", name) for text in several) else None
            assert own.first(name) == want, (several, name)
            found += want is not None
    assert found > 2000


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (r"(?!.*vision).*\.(?:q|v)_proj", "text.layers.0.q_proj", True),
        (r"(?!.*vision).*\.(?:q|v)_proj", "vision.layers.0.q_proj", False),
        (r"^(?:(?!lm_head).)*$", "model.lm_head", False),
        (r"(?i)MODEL\..*(?<!k)_proj", "model.0.q_proj", True),
        (r".*\.layers\.(1[0-9]|[0-9])\.(attn|mlp)\..*", "model.layers.17.mlp.up", True),
    ],
)
def test_patterns_that_people_write(text: str, name: str, expected: bool) -> None:
    assert (asked(text, whole=True).first(name) is not None) == expected


@pytest.mark.parametrize("text", ["(a+)+$", "(a|a)*b", "(.*)*x", r"(?!x)(\w+)*c", "((a*)*)*c", "(?i:(a+)+)c"])
@pytest.mark.parametrize("whole", [True, False])
def test_catastrophic_patterns_take_linear_steps(text: str, whole: bool) -> None:
    costs = []
    for length in (500, 1000):
        own = asked(text, whole=whole)
        own.first("a")
        before = own.work
        own.first("a" * length + "!")
        costs.append(own.work - before)
    assert costs[1] < 2.2 * costs[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (r"(a)\1", "a backreference"),
        ("(?>a)", "an atomic group"),
        ("a++", "a possessive repeat"),
        ("(a)?(?(1)b|c)", "a conditional group"),
        ("((a{1000}){1000}){9}", "small once their repeats are written out"),
        ("(" * 5000 + ")" * 5000, "small once"),
        ("a" * 40_000 + "*", "at most 32768 letters"),
        ("[", "regular expressions"),
        ("(?<=a+)b", "fixed-width"),
    ],
)
def test_what_no_engine_matches_in_linear_time_is_refused(text: str, told: str) -> None:
    with pytest.raises(FormatError, match=re.escape(told)) as refusal:
        asked(text).first("module")
    assert len(str(refusal.value)) < 500
    assert "as names: q_proj|v_proj" in str(refusal.value)


def test_many_plain_names_are_looked_up_and_many_expressions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = asked(*(f"model.layers.{layer}.q_proj" for layer in range(10_000)))
    assert plain.first("base.model.layers.9999.q_proj") == "model.layers.9999.q_proj"
    for layer in range(300):
        assert plain.first(f"model.layers.{layer}.k_proj") is None
    assert plain.work < 1_000_000
    monkeypatch.setattr(patterns, "_WORK", 10_000_000)
    with pytest.raises(FormatError, match="Write fewer or shorter patterns"):
        asked(*(f"(x+x+)+y{number}" for number in range(1000))).first("up")


def test_a_name_of_two_lines_is_refused() -> None:
    with pytest.raises(FormatError, match="line break"):
        asked("a").first("a\n")
    assert asked().first("a\n") is None


def test_endings() -> None:
    own = Endings(["fc", "up.proj", ""])
    assert own.end("xfc")
    assert own.end("anything")
    named = Endings(["fc", "up.proj"])
    assert not named.end("fcx")
    assert [named.end_module(name) for name in ("fc", "a.fc", "xfc", "b.up.proj", "proj", "")] == [1, 1, 0, 1, 0, 0]


def test_fields_of_another_type_are_refused() -> None:
    from tpeft_deploy.formats.peft.refusals import check_fields

    for field, value in json.loads(
        '{"alpha_pattern": [], "rank_pattern": "x", "target_modules": [1], "target_parameters": "x"}'
    ).items():
        with pytest.raises(FormatError, match=field):
            check_fields({field: value}, "the test's")
        check_fields({field: None}, "the test's")

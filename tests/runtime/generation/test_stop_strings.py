from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpeft_deploy.runtime.generation.stop_strings import StopStrings

LETTERS = st.text("ab", min_size=1, max_size=5)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.found


def by_hand(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(LETTERS, max_size=3), st.lists(st.text("ab", max_size=4), max_size=8))
def test_the_first_match_ends_the_text_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == by_hand(stops, "".join(pieces))


@given(st.lists(LETTERS, min_size=1, max_size=3), st.lists(st.text("ab", max_size=4), max_size=8))
def test_no_part_of_a_match_is_let_through_and_no_more_is_held_than_may_be_one(
    stops: list[str], pieces: list[str]
) -> None:
    matcher, given_out, so_far = StopStrings(stops), "", ""
    final = by_hand(stops, "".join(pieces))[0]
    for piece in pieces:
        given_out += matcher.push(piece)
        so_far += piece
        assert final.startswith(given_out)
        if matcher.found is None:
            held = so_far[len(given_out) :]
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_without_stop_strings_passes_at_once() -> None:
    matcher = StopStrings([])
    assert matcher.push("abc") == "abc"
    assert matcher.flush() == ""


def test_nothing_comes_after_a_match() -> None:
    matcher = StopStrings(["\n\n"])
    assert [matcher.push(piece) for piece in ("x\n", "\ny", "z")] == ["x", "", ""]
    assert matcher.found == "\n\n"

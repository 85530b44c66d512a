"""Messages of a cluster: steps of sequences that are sent together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpeft_deploy.errors import RunError
from tpeft_deploy.runtime.cluster.wire import SequenceStep, joined
from tpeft_deploy.runtime.generation.sampling import Token

ENDS = (SequenceStep(0, reason="stop"), SequenceStep(0, error=RunError("generate", problem="lost")))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 99), max_size=3)), max_size=30),
    st.sampled_from([None, *ENDS]),
)
def test_joined_steps_say_what_the_steps_said(parts: list[tuple[int, list[int]]], end: SequenceStep | None) -> None:
    steps = [SequenceStep(choice, tuple(Token(number, 0.0) for number in tokens)) for choice, tokens in parts]
    steps += [] if end is None else [end]
    found = joined(steps)
    assert len({step.choice for step in found}) == len(found)
    for step in found:
        own = [other for other in steps if other.choice == step.choice]
        assert [token.id for token in step.tokens] == [token.id for other in own for token in other.tokens]
        assert (step.reason, step.error) == (own[-1].reason, own[-1].error)
    assert {step.choice for step in found} == {step.choice for step in steps}

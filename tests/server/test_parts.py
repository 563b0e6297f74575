"""Parts that are changed one by one are what a dict of them would be, whatever was changed in whatever order."""

from __future__ import annotations

from dataclasses import replace

from choral_server.parts import OPEN_PARTS, Part, Parts, PartState
from hypothesis import given
from hypothesis import strategies as st

STATES = st.sampled_from(PartState)


def part(number: int, state: PartState = PartState.ANNOUNCED) -> Part:
    return Part(f"run/3/{number}", f"client-{number}", state)


@given(st.integers(0, 40), st.lists(st.lists(st.tuples(st.integers(0, 50), STATES), max_size=6), max_size=30))
def test_parts_are_what_a_dict_of_them_is(count: int, batches: list[list[tuple[int, PartState]]]) -> None:
    first = Parts(part(number) for number in range(count))
    parts, expected = first, {each.assignment: each for each in first.values()}
    for batch in batches:
        changes = [part(number, state) for number, state in batch]
        before, after = parts, parts.having(changes)
        copy = dict(expected)
        expected |= {each.assignment: each for each in changes}
        assert before == copy  # it never changes
        assert list(after) == list(expected)
        assert after == expected
        assert after.since(before) == [each for name, each in expected.items() if copy.get(name) is not each]
        for state in PartState:
            assert after.count(state) == sum(each.state is state for each in expected.values())
        assert after.count(*OPEN_PARTS) == sum(each.state in OPEN_PARTS for each in expected.values())
        for place, (name, each) in enumerate(expected.items()):
            assert (after.place(name), after.of(each.client)) == (place, each)
        parts = after
    assert parts.since(first) == [each for name, each in expected.items() if first.get(name) is not each]
    assert first.of("nobody") is None


def test_a_client_with_two_parts_has_the_first() -> None:
    parts = Parts([part(1), replace(part(1), assignment="run/3/again")])
    assert parts.of("client-1") == part(1)

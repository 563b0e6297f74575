from __future__ import annotations

import re

import choral.errors
import grpc
import pytest
from choral.errors import ChoralError, Refused, by_name

TREE = [
    kind
    for kind in vars(choral.errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception
]


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn: dict[str, str] = {}
    above = {-1: "Exception"}
    for line in (choral.errors.__doc__ or "").splitlines():
        found = re.match(r"    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+)(  |$)", line)
        if found:
            depth = len(found["branch"]) // 4
            above[depth] = found["name"]
            drawn[found["name"]] = above[depth - 1]
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in TREE if kind.__base__ is not None}


def test_those_said_to_be_worth_another_try_are_retryable() -> None:
    drawn = set(re.findall(r"(\w+) .*\(try again\)", choral.errors.__doc__ or ""))
    retryable = {
        "TaskProcessGone",
        "Unreachable",
        "CorruptTransfer",
        "OutOfSpace",
        "ArtifactsGone",
        "DatabaseGone",
        "LimitExceeded",
    }
    assert drawn == {kind.__name__ for kind in TREE if kind.retryable} == retryable


@pytest.mark.parametrize("kind", TREE)
def test_each_class_is_found_by_name_and_has_a_grpc_status_and_an_exit_code(kind: type[ChoralError]) -> None:
    assert by_name(kind.__name__) is kind
    assert grpc.StatusCode[kind.grpc_code] is not grpc.StatusCode.OK
    assert 1 <= kind.exit_code < 64


def test_exit_codes_tell_the_situations_apart() -> None:
    top = [kind.exit_code for kind in TREE if kind.__base__ is ChoralError and kind.exit_code != ChoralError.exit_code]
    assert sorted(top) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_name_from_a_later_release_is_a_refusal() -> None:
    assert by_name("QuotaExceeded") is Refused

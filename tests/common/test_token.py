from __future__ import annotations

import pytest
from choral.errors import TrustError
from choral.token import SECRET_BYTES, Token, digest_of
from hypothesis import given
from hypothesis import strategies as st

TOKENS = st.builds(
    Token,
    name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", fullmatch=True),
    port=st.integers(0, 65_535),
    authority=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
)


@given(TOKENS)
def test_what_was_written_is_read(token: Token) -> None:
    assert Token.parse(f" {token}\n") == token


@given(TOKENS, st.data())
def test_a_character_that_was_mistyped_is_found(token: Token, data: st.DataObject) -> None:
    text = str(token)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("ABCabc019-_ !").filter(lambda one: one != text[place]))
    with pytest.raises(TrustError):
        Token.parse(text[:place] + other + text[place + 1 :])


@given(TOKENS, st.integers(1, 200))
def test_a_piece_that_is_missing_is_found(token: Token, count: int) -> None:
    with pytest.raises(TrustError) as refused:
        Token.parse(str(token)[:-count])
    if len(left := str(token)[8:-count]) > 8:  # less is in any sentence
        assert left not in str(refused.value)


@pytest.mark.parametrize("text", ["", "choral-", "choral", "x" * 5000, "choral-" + "A" * 5000, "choral-é", "choral-\0"])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(TrustError, match="enrolment token"):
        Token.parse(text)


@pytest.mark.parametrize("name", ["", "..", "/../../escaped", "a/b", "a\n", "a\0", "x" * 65, "é"])
def test_a_name_that_nobody_may_have_is_refused(name: str) -> None:
    """It becomes the name of a folder."""
    with pytest.raises(TrustError, match="for a name that nobody may have"):
        Token.parse(str(Token(name, 8471, bytes(32))))


def test_a_secret_is_new_each_time_and_shows_nowhere_else() -> None:
    one, other = (Token("alice", 8471, bytes(32)) for _ in range(2))
    assert one.secret != other.secret
    assert digest_of(one.secret) != digest_of(other.secret)
    assert repr(one.secret) not in repr(one)
    assert one.secret.hex() not in digest_of(one.secret)

"""A client that cheats in a secure sum, among real ones: the sum is right, or there is none, and operators see why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from choral.messages import Phase, Status
from choral.secagg import keys
from choral.secagg.roster import Signer
from choral.secagg.shamir import PRIME
from choral.sum_messages import SumAdvert, SumRevealed, SumSignature
from choral.v1 import federation_pb2 as pb
from choral.v1 import model_pb2 as mb
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from e2e.federation import Federation
from e2e.liar import Lie
from e2e.mallory import NAME, UPDATE, Mallory, noise
from e2e.secure_stage import NAMES, Played, Stage, staged
from e2e.zygote import Zygote

HONEST = ALICE, BOB, CAROL = NAMES[:3]
Cheat = Callable[[Mallory, Stage], None]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Iterator[Stage]:
    made_in = tmp_path_factory.mktemp("f")
    with Federation(made_in, zygote=zygote) as federation, staged(federation, HONEST, start_with=3) as made:
        made.over(0)
        yield made
    for process in federation.processes:
        assert "Traceback" not in process.stderr


class Held(Lie):
    """What the others say of this kind does not arrive before it is released."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._kept: list[tuple[str, pb.AttendRequest]] = []
        self._free: set[str] = set()
        self._locked = threading.Lock()

    def said(self, client: str, message: pb.AttendRequest) -> Iterable[pb.AttendRequest]:
        with self._locked:
            if message.WhichOneof("message") != self.kind or client in self._free:
                return (message,)
            self._kept.append((client, message))
            return ()

    def release(self, *clients: str) -> None:
        """What they say of it arrives."""
        with self._locked:
            self._free |= set(clients)
            for client, message in self._kept:
                if client in clients:
                    self.liar.say(client, message)


def play(stage: Stage, cheat: Cheat, lie: Lie | None = None) -> Played:
    """A round with the cheat, who leaves when it is over."""
    number, before = stage.next, stage.model()
    stage.liar.lies(lie or Lie(), number)
    with Mallory(stage.federation) as mallory:
        stage.ask()
        mallory.asked()
        cheat(mallory, stage)
        stage.over(number)
    played = stage.played(number, before)
    for name in HONEST:
        assert played.said("sum_revealed").count(name) <= 1
    return played


# What does no harm


def honest(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share()
    mallory.send_result(mallory.masks())
    mallory.sign_survivors()
    mallory.reveal()


def shares_that_bob_cannot_read(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: replace(said, sealed={**said.sealed, BOB: noise(said.sealed[BOB])}))
    mallory.send_result(mallory.masks())
    mallory.sign_survivors()
    mallory.reveal()


def no_word_after_its_result(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share()
    mallory.send_result(mallory.masks())
    mallory.leave()


def its_result_twice(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share()
    mask = mallory.masks()
    assert mallory.send_result(mask).verdict == pb.VERDICT_ACCEPTED
    assert mallory.send_result(mask, content=noise).verdict == pb.VERDICT_DUPLICATE
    mallory.sign_survivors()
    mallory.reveal()


def words_in_the_name_of_another(mallory: Mallory, stage: Stage) -> None:
    """What it says of the assignment of bob."""
    bobs = [one.id for client, one in stage.liar.spoken("assignment") if client == BOB][-1]

    def of_bob(said: Any) -> Any:
        mallory.tell(replace(said, assignment=bobs))
        return said

    mallory.advertise(of_bob)
    mallory.share(of_bob)
    mallory.send_result(mallory.masks())
    mallory.sign_survivors(of_bob)
    mallory.reveal(of_bob)


@pytest.mark.parametrize(
    "cheat",
    [
        honest,
        shares_that_bob_cannot_read,
        no_word_after_its_result,
        its_result_twice,
        words_in_the_name_of_another,
    ],
)
def test_the_sum_is_right_with_its_result(stage: Stage, cheat: Cheat) -> None:
    played = play(stage, cheat)
    played.sums(HONEST, mallory=UPDATE)
    assert sorted(played.said("sum_revealed")) == list(HONEST)
    if cheat is shares_that_bob_cannot_read:
        assert stage.clients[BOB].saw("no shares", sender=NAME)


def test_it_shows_keys_twice_before_the_sum_begins(stage: Stage) -> None:
    """As a client may whose link was broken: the first are forgotten."""
    held = Held("sum_advert")

    def twice(mallory: Mallory, stage: Stage) -> None:
        def both(said: SumAdvert) -> SumAdvert:
            mallory.tell(mallory.sign(said, mask_key=keys.fresh().shown().mask_key))
            ready(watching, NAME)
            return said

        watching = stage.federation.watch()
        next(watching)
        mallory.advertise(both)
        ready(watching, NAME)
        held.release(*HONEST)
        mallory.share()
        assert mallory.roster.shown(NAME) == mallory.masking._mine.shown()
        mallory.send_result(mallory.masks())
        mallory.sign_survivors()
        mallory.reveal()

    play(stage, twice, held).sums(HONEST, mallory=UPDATE)


def ready(watching: Iterator[Any], client: str) -> None:
    """Wait until the coordinator has taken a client's keys."""
    next(one for one in watching if any((part.client, part.state) == (client, "ready") for part in one.round.parts))


# What shuts it out


def in_the_name_of_bob(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise(lambda said: replace(said, advert=replace(said.advert, client=BOB)))


def unsigned(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise(lambda said: replace(said, advert=replace(said.advert, signature=bytes(64))))


def signed_with_another_key(mallory: Mallory, stage: Stage) -> None:
    key = Ed25519PrivateKey.generate()
    mallory.signer = Signer(key.sign, key.public_key().public_bytes_raw())
    mallory.advertise(lambda said: mallory.sign(said))


def no_key(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise(lambda said: mallory.sign(said, mask_key=bytes(32)))


def other_keys_too_late(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: mallory.sign(SumAdvert(said.assignment, mallory.roster.adverts[-1]), mask_key=noise(bytes(32))))


def shares_for_bob_alone(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: replace(said, sealed={BOB: said.sealed[BOB]}))


def shares_for_a_stranger(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: replace(said, sealed={**said.sealed, "stranger": said.sealed[BOB]}))


def short_shares(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: replace(said, sealed=dict.fromkeys(said.sealed, b"short")))


def sends(**header: Any) -> Cheat:
    def cheat(mallory: Mallory, stage: Stage) -> None:
        mallory.advertise()
        mallory.share()
        assert mallory.send_result(mallory.masks(), **header).verdict == pb.VERDICT_REFUSED

    return cheat


def result_before_its_time(mallory: Mallory, stage: Stage) -> None:
    assert mallory.send_result().verdict == pb.VERDICT_REFUSED


LOSS = mb.Metric(name="loss", value=1.0, examples=4)


@pytest.mark.parametrize(
    ("cheat", "told"),
    [
        (in_the_name_of_bob, "mallory shows keys that are said to be those of bob"),
        (unsigned, "mallory has not signed the keys that are said to be its own"),
        (signed_with_another_key, "mallory has enrolled with another signing key than it shows in the secure sum"),
        (no_key, "mallory shows what is no key"),
        (other_keys_too_late, "the secure sum has begun with the keys that were shown by then"),
        (shares_for_bob_alone, "mallory sends shares for 1 of its 3 neighbours"),
        (shares_for_a_stranger, "mallory sends shares for 4 of its 3 neighbours"),
        (short_shares, "mallory sends shares that are not of 80 bytes"),
        (sends(examples=4), "mallory tells numbers of its own beside a masked result"),
        (sends(held_out=[LOSS]), "mallory tells numbers of its own beside a masked result"),
        (sends(work=[LOSS]), "mallory tells numbers of its own beside a masked result"),
        (sends(codec=""), "mallory sends its result as float32; masked was asked for"),
        (sends(content=lambda content: content + b"!"), "mallory announces"),
        (result_before_its_time, "mallory takes no part in a secure sum now"),
    ],
)
def test_it_is_shut_out_and_the_others_sum_without_it(stage: Stage, cheat: Cheat, told: str) -> None:
    played = play(stage, cheat)
    assert told in played.event("result refused", NAME)
    played.sums(HONEST)
    assert sorted(played.said("sum_revealed")) == list(HONEST)


def test_it_shows_the_keys_of_another(stage: Stage) -> None:
    held = Held("sum_advert")

    def keys_of_bob(mallory: Mallory, stage: Stage) -> None:
        number = mallory.terms.round
        stage.liar.wait(lambda: {client for client, _ in stage.liar.heard("sum_advert", number)} == set(HONEST))
        watching = stage.federation.watch()
        next(watching)
        held.release(BOB)
        ready(watching, BOB)
        (bobs,) = [one for client, one in stage.liar.heard("sum_advert", number) if client == BOB]
        mallory.advertise(lambda said: mallory.sign(said, mask_key=bobs.mask_key))
        stage.coordinator.saw("refused in the secure sum", client=NAME, reason="mallory shows a key that another client has shown")
        held.release(*HONEST)

    played = play(stage, keys_of_bob, held)
    assert "mallory shows a key that another client has shown" in played.event("result refused", NAME)
    played.sums(HONEST)


# What shuts it out when its result is in the sum already


def signs(change: Callable[[SumSignature], SumSignature]) -> Cheat:
    def cheat(mallory: Mallory, stage: Stage) -> None:
        mallory.advertise()
        mallory.share()
        mallory.send_result(mallory.masks())
        mallory.sign_survivors(change)

    return cheat


def declines(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share()
    mallory.send_result(mallory.masks())
    mallory.tell(Status(mallory.assignment, Phase.DECLINED, "it has thought better of it"))


@pytest.mark.parametrize(
    ("cheat", "told"),
    [
        (signs(lambda said: replace(said, signature=bytes(64))), "mallory has not signed who has sent a masked update"),
        (signs(lambda said: replace(said, signature=b"?")), "mallory has not signed who has sent a masked update"),
        (declines, "it has thought better of it"),
    ],
)
def test_it_does_not_go_on_and_its_result_is_in_the_sum(stage: Stage, cheat: Cheat, told: str) -> None:
    played = play(stage, cheat)
    assert told in played.event("secure sum left", NAME)
    played.sums(HONEST, mallory=UPDATE)
    assert sorted(played.said("sum_revealed")) == list(HONEST)


# What spoils the round


def shares_that_two_cannot_read(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise()
    mallory.share(lambda said: replace(said, sealed={**said.sealed, BOB: bytes(80), CAROL: bytes(80)}))
    mallory.send_result(mallory.masks())
    mallory.sign_survivors()
    mallory.reveal()


def another_commitment(mallory: Mallory, stage: Stage) -> None:
    mallory.advertise(lambda said: mallory.sign(said, commitment=keys.fresh().shown().commitment))
    mallory.share()
    mallory.send_result(mallory.masks())
    mallory.sign_survivors()
    mallory.reveal()


def masked(numbers: dict[str, float] | None = None, content: Callable[[bytes], bytes] = lambda content: content) -> Cheat:
    def cheat(mallory: Mallory, stage: Stage) -> None:
        mallory.advertise()
        mallory.share()
        mallory.send_result(mallory.masks(), numbers, content)
        mallory.sign_survivors()
        mallory.reveal()

    return cheat


def noise_in_the_update(content: bytes) -> bytes:
    """Half the ring added to the first entry: whichever the mask is, the sum is far beyond what four clips make."""
    return bytes([content[0], content[1], content[2], content[3] ^ 0x80]) + content[4:]


@pytest.mark.parametrize(
    ("cheat", "told"),
    [
        (shares_that_two_cannot_read, "shares of a secret of mallory do not give it back"),
        (another_commitment, "shares of a secret of mallory do not give it back, where 3 that are right would"),
        (masked(content=noise), "some client has sent something else than it should, and nobody can see which"),
        (masked(content=noise_in_the_update), "an entry of the sum of updates is"),
        (masked({"clients": 2.0}), "the sum of 'clients' is 5 where 4 can be"),
        (masked({"weight": 1000.0}), "the sum of 'weight' is 1012 where 4 to 16 can be"),
        (masked({"weight": 0.5}), "the sum of 'weight' is 12.5 where 4 to 16 can be"),
        (masked({"clipped": -1.0}), "the sum of 'clipped' is -1 where 0 to 4 can be"),
    ],
)
def test_there_is_no_sum_and_the_next_round_is_without_it(stage: Stage, cheat: Cheat, told: str) -> None:
    played = play(stage, cheat)
    assert played.state == "round abandoned"
    assert told in played.reason
    assert told in played.event("round abandoned")


# What it reveals, before the others do


def reveals(mallory: Mallory, change: Callable[[SumRevealed], SumRevealed]) -> None:
    mallory.advertise()
    mallory.share()
    mallory.send_result(mallory.masks())
    mallory.sign_survivors()
    mallory.reveal(change)


def test_wrong_shares_do_no_harm_where_there_are_enough_that_are_right(stage: Stage) -> None:
    held = Held("sum_revealed")

    def cheat(mallory: Mallory, stage: Stage) -> None:
        reveals(mallory, lambda said: replace(said, mask_seeds=dict.fromkeys(said.mask_seeds, 7)))
        held.release(ALICE, BOB)  # with hers they are enough, and do not give the masks back
        stage.liar.wait(lambda: len(stage.liar.heard("sum_revealed", mallory.terms.round)) == 3)
        held.release(*HONEST)

    play(stage, cheat, held).sums(HONEST, mallory=UPDATE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda said: replace(said, key_seeds={BOB: said.mask_seeds[BOB]}, mask_seeds={}),
            "mallory reveals shares of others than it was asked for",
        ),
        (
            lambda said: replace(said, mask_seeds={**said.mask_seeds, "stranger": 1}),
            "mallory reveals shares of others than it was asked for",
        ),
        (lambda said: replace(said, mask_seeds=dict.fromkeys(said.mask_seeds, PRIME)), "mallory reveals what are no shares"),
    ],
)
def test_what_it_reveals_is_refused(stage: Stage, change: Callable[[SumRevealed], SumRevealed], told: str) -> None:
    held, refused = Held("sum_revealed"), len(stage.coordinator.events("refused in the secure sum"))

    def cheat(mallory: Mallory, stage: Stage) -> None:
        reveals(mallory, change)
        stage.coordinator.saw("refused in the secure sum", refused + 1)
        held.release(*HONEST)

    played = play(stage, cheat, held)
    assert told in played.event("secure sum left", NAME)
    played.sums(HONEST, mallory=UPDATE)
    assert sorted(played.said("sum_revealed")) == list(HONEST)

"""More clients than there are places for: they attend in turns."""

from __future__ import annotations

from e2e.federation import Federation, until
from e2e.scripted import Scripted, hello


def test_all_contribute_though_few_may_attend_at_once(quick: Federation) -> None:
    names = ("alice", "bob", "carol", "dave", "erin")
    run = {"rounds": 1000, "cohort_size": 2}
    coordinator = quick.coordinator(run=run, evaluation={"clients": False}, limits={"sessions": 2})
    for name in names:
        quick.client(name)
    until(lambda: {row["name"] for row in quick.rows("clients", "list") if int(row["accepted"]) >= 2} == set(names))
    for opened in quick.rows("rounds", "list"):
        assert len(opened["parts"]) <= 2
    assert quick.command("runs", "stop", "-c", quick.config).code() == 0
    assert coordinator.code() == 0


def test_who_has_no_place_is_on_record_with_the_time_of_its_return(quick: Federation) -> None:
    quick.coordinator(
        run={"rounds": 1, "cohort_size": 1}, limits={"sessions": 1, "returns_per_s": 0.1}, evaluation={"clients": False}
    )
    with Scripted(quick, hello("alice")) as alice:
        assert alice.hear("assignment").round == 0
        with Scripted(quick, hello("bob")) as bob:
            told = bob.hear("come_back")
            assert told.after_s >= 1
            assert told.reason == "the coordinator has no place left for more clients at once"
        with Scripted(quick, hello("carol")) as carol:
            assert carol.hear("come_back").after_s >= 11  # ten seconds after bob
        found = {row["name"]: row for row in quick.rows("clients", "list")}
        assert found["alice"]["attending"]
        assert "away_until" not in found["alice"]
        assert not found["bob"]["attending"]
        assert found["bob"]["away_until"]


def test_with_many_sessions_each_is_asked_for_fewer_heartbeats(quick: Federation) -> None:
    limits = {"heartbeats_per_s": 0.05}
    quick.coordinator(run={"rounds": 1, "cohort_size": 3}, limits=limits, evaluation={"clients": False}, heartbeat_s=15.0)
    with Scripted(quick, hello("alice")) as alice:
        assert alice.hear("welcome").heartbeat_s == 20.0
        with Scripted(quick, hello("bob")) as bob:
            assert bob.hear("welcome").heartbeat_s == 40.0

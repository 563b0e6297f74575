"""Where a process dies, and how; that nothing is lost there is for the end-to-end tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from choral.errors import ConfigError
from choral_server import failpoints
from choral_server.failpoints import ALL, VARIABLE, Step, Transition


def _passing(*names: str, **environment: str) -> tuple[list[str], int]:
    """What a process tells that comes by these places, and how it ends."""
    code = "import sys\nfrom choral_server.failpoints import reach\nfor name in sys.argv[1:]: print(name, flush=True); reach(name)"
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env={**clean, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout.split(), done.returncode


def test_every_place_has_a_name_of_its_own() -> None:
    assert len(set(ALL)) == len(ALL) == 2 * len(Transition) + len(Step)
    assert (Transition.ROUND_CLOSED.before, Transition.ROUND_CLOSED.after) == ("round-closed:before", "round-closed:after")
    assert {"round-closed:before", "round-closed:after", "upload-spooled"} <= set(ALL)


def test_a_process_dies_at_the_place_that_was_named() -> None:
    names = ("run-begun:before", "run-begun:after", "upload-spooled")
    assert _passing(*names, CHORAL_FAILPOINT="run-begun:after") == (["run-begun:before", "run-begun:after"], -signal.SIGKILL)


def test_the_third_time_it_comes_by() -> None:
    names = ("upload-spooled", "upload-folded") * 4
    assert _passing(*names, CHORAL_FAILPOINT="upload-spooled#3") == (list(names[:5]), -signal.SIGKILL)
    assert _passing(*names, CHORAL_FAILPOINT="upload-spooled#5") == (list(names), 0)


@pytest.mark.parametrize("environment", [{}, {VARIABLE: ""}, {VARIABLE: "sum-written"}])
def test_otherwise_it_lives(environment: dict[str, str]) -> None:
    assert _passing("upload-spooled", "run-over:after", **environment) == (["upload-spooled", "run-over:after"], 0)


@pytest.mark.parametrize("value", [None, "", *ALL, "round-closed:after#3", "sum-written#10"])
def test_places_that_there_are(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    failpoints.check()


@pytest.mark.parametrize(
    "value",
    ["round-closed", "round-closed:during", "ROUND-CLOSED:after", "sum-written#0", "sum-written#x", "sum-written#-1", "x#²"],
)
def test_a_place_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError) as refused:
        failpoints.check()
    told = str(refused.value)
    assert told.startswith(f"CHORAL_FAILPOINT={value!r}: is no failpoint; there are run-begun:before, run-begun:after, ")
    assert told.endswith("spool-cleared, each with #N behind it")

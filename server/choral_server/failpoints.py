"""Places where a coordinator can be made to die, so that tests can show that nothing is lost there.

`CHORAL_FAILPOINT=round-closed:after` makes the process send itself SIGKILL there, `…:after#3` when it comes by for the third time.
Every transition that is committed has two, before and after its commit; the others stand between two steps on files.
"""

from __future__ import annotations

import enum
import os
import re
import signal
from collections import Counter

from choral.errors import ConfigError

VARIABLE = "CHORAL_FAILPOINT"


class Transition(enum.Enum):
    """What is committed before anyone hears of it."""

    RUN_BEGUN = "run-begun"
    ROUND_OPENED = "round-opened"
    PARTS_CHANGED = "parts-changed"
    ROUND_CLOSED = "round-closed"
    VERSION_PUBLISHED = "version-published"
    VERSION_MEASURED = "version-measured"
    RUN_OVER = "run-over"

    @property
    def before(self) -> str:
        """Just before the commit."""
        return f"{self.value}:before"

    @property
    def after(self) -> str:
        """Just after the commit."""
        return f"{self.value}:after"


class Step(enum.Enum):
    """Steps on files."""

    UPLOAD_SPOOLED = "upload-spooled"
    UPLOAD_FOLDED = "upload-folded"
    SUM_WRITTEN = "sum-written"
    SUM_CONTAINED_DELETED = "sum-contained-deleted"
    CHECKPOINT_WRITTEN = "checkpoint-written"
    SPOOL_CLEARED = "spool-cleared"


ALL = tuple(name for transition in Transition for name in (transition.before, transition.after)) + tuple(s.value for s in Step)
_passed: Counter[str] = Counter()


def check() -> None:
    """Raises ConfigError: the environment names a failpoint that does not exist."""
    wanted, _, count = os.environ.get(VARIABLE, "").partition("#")
    if wanted and (wanted not in ALL or not re.fullmatch(r"([1-9][0-9]*)?", count)):
        raise ConfigError(
            f"{VARIABLE}={os.environ[VARIABLE]!r}: is no failpoint; there are {', '.join(ALL)}, each with #N behind it"
        )


def reach(name: str) -> None:
    """End this process as `kill -9` would, if the environment says so."""
    wanted, _, count = os.environ.get(VARIABLE, "").partition("#")
    if wanted != name:
        return
    _passed[name] += 1
    if _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)

"""How many files this process may have open: each connection is one."""

from __future__ import annotations

import resource
from contextlib import suppress

import structlog

log = structlog.get_logger()
_ENOUGH = 1_048_576
_OWN = 256  # besides connections: the database, the spool, checkpoints


def allow(connections: int) -> int:
    """Raise the soft limit as far as this user may, and say so if it is too low for so many connections; the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < connections + _OWN:
        told = f"raise it (ulimit -n, LimitNOFILE) to {connections + _OWN}, or lower limits.connections"
        log.warning("few open files", allowed=soft, connections=connections, cure=told)
    return soft

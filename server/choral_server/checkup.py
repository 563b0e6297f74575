"""Whether a coordinator could start: what it needs, looked at one by one. What `choral doctor` says when none runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from pathlib import Path

from choral.errors import ChoralError
from choral.task import load_task

from choral_server import disk
from choral_server.artifacts import open_artifacts
from choral_server.config import ServerConfig
from choral_server.database import Database
from choral_server.diagnosis import Finding
from choral_server.troubles import Troubles

_PATIENCE_S = 10.0


async def check_up(config: ServerConfig) -> list[Finding]:
    """What is there and what is missing, in the order in which a start would need it."""
    return [
        await _looked("task", _task(config.task)),
        await _looked("state", _folder(config.state)),
        await _looked("database", _database(config)),
        await _looked("artifacts", _artifacts(config)),
    ]


async def _looked(subject: str, look: Awaitable[str]) -> Finding:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return Finding(subject, True, await look)
    except TimeoutError:
        return Finding(subject, False, f"did not answer for {_PATIENCE_S:g} s", "look whether it runs and can be reached from here")
    except ChoralError as error:
        return Finding(subject, False, str(error), "mend that, then start `choral server`")


async def _task(reference: str) -> str:
    task = load_task(reference)
    return f"{task.name} {task.version}"


async def _folder(folder: Path) -> str:
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ChoralError(f"{there} cannot be written by this user")
    if (reason := disk.shortage(there, 0)) is not None:
        raise ChoralError(reason)
    return f"{folder} can be written"


async def _database(config: ServerConfig) -> str:
    if config.database is None and not (config.state / "choral.db").exists():
        return "will be made in the state folder"
    database = await Database.open(config.database_url, Troubles(), migrate=False)
    await database.close()
    return "answers"


async def _artifacts(config: ServerConfig) -> str:
    await open_artifacts(config.artifacts, config.state)
    return "can be written"

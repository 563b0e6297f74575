"""Versions as they are announced: a small one travels with the first word of it on a stream, and nobody has to fetch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from choral.messages import Assignment, FromCoordinator, NewVersion, VersionRef, Welcome
from choral.wire import SMALL_BYTES


class Contents:
    """The bytes of small versions, of which the last is at hand; `path_of` says where a version's file is."""

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._last: VersionRef | None = None

    def with_content(self, version: VersionRef) -> VersionRef:
        """The version with its content; without, if it is not small, or its file is not here."""
        if version.size_bytes > SMALL_BYTES:
            return version
        if self._last is None or self._last != version:
            try:
                content = self._path_of(version.number).read_bytes()
            except OSError:  # it can be fetched when it is here again
                return version
            if len(content) != version.size_bytes:
                return version
            self._last = replace(version, content=content)
        return self._last


class Announcements:
    """What is said on one stream: each version's content once."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._given: VersionRef | None = None

    def complete(self, message: FromCoordinator) -> FromCoordinator:
        """The message with the content of its version, if that is small and was not given before."""
        if not isinstance(message, Welcome | Assignment | NewVersion) or message.version == self._given:
            return message
        version = self._contents.with_content(message.version)
        if not version.content:
            return message
        self._given = version
        return replace(message, version=version)

"""What no input may make a decoder do, and how that is noticed.

    crash    an exception that the product does not expect there: RecursionError and MemoryError among them
    memory   more allocated than the target may: the process is held to that much more than it has (RLIMIT_DATA, which counts
             what is asked for, touched or not, and neither files that are mapped nor address space that is only reserved)
    reach    a pickle is read, a program or a connection is begun, a file is opened outside the target's folder (sys.addaudithook)
    time     it takes longer than any input of this size should
    words    what is told of the input repeats more of it than may be told on to others

An audit hook cannot be taken away again: there is one a process, and it sleeps while nothing is watched.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import sysconfig
import threading
import traceback
import zoneinfo
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"}
_PATHS = {  # event -> which of its arguments are paths that it changes, each with the argument that says of which folder
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "shutil.rmtree": ((0, None),),
    "sqlite3.connect": ((0, None),),
}
# Python's own files, this repository's and the time zones are read whenever something is imported or looked up.
_READABLE = tuple(
    os.path.realpath(place)
    for place in (
        sys.prefix,
        sys.base_prefix,
        REPOSITORY,
        *sysconfig.get_paths().values(),
        *zoneinfo.TZPATH,
        "/proc",
        "/sys",
        "/usr",
    )
)
_DEVICES = {"/dev/null", "/dev/urandom"}


class Finding(BaseException):
    """A decoder did what none may. Not an Exception, so that nothing takes it for an error of the input."""

    def __init__(self, kind: str, told: str, place: str = "") -> None:
        super().__init__(f"{kind}: {told}{place and ' at '}{place}")
        self.kind = kind
        self.place = place or told
        """what makes it the same finding as another"""


class _Hook:
    """The audit hook. `folder` is where things may be written now; None: nothing is watched."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: Finding | None = None
        self._installed = False
        self._own = threading.local()

    def install(self) -> None:
        if not self._installed:
            sys.addaudithook(self)
            self._installed = True

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or getattr(self._own, "busy", False):
            return
        if event == "open":
            self._opened(*args)
        elif event in _PATHS:
            for place, of in _PATHS[event]:
                self._changed(event, _full(args[place], args[of] if of is not None else -1))
        elif event in _FORBIDDEN:
            self.refuse(f"{event} {args[:2]}")

    def _opened(self, path: Any, _mode: Any, flags: int) -> None:
        if isinstance(path, int):
            return
        if flags & _WRITING:
            self._changed("open for writing", path)
        elif not self._within(path, (str(self.folder), *_READABLE)) and os.fsdecode(path) not in _DEVICES:
            self.refuse(f"open {path!r}")

    def _changed(self, what: str, path: Any) -> None:
        if not isinstance(path, int) and os.fsdecode(path) not in _DEVICES and not self._within(path, (str(self.folder),)):
            self.refuse(f"{what} {path!r}")

    def _within(self, path: Any, places: tuple[str, ...]) -> bool:
        self._own.busy = True
        try:
            real = os.path.realpath(os.fsdecode(path))
        except ValueError:  # a NUL: nothing is opened
            return True
        finally:
            self._own.busy = False
        if real == ":memory:":
            return True
        return any(real == place or real.startswith(f"{place}/") for place in places)

    def refuse(self, what: str) -> NoReturn:
        """Kept as well as raised: what is raised in a thread, or swallowed, counts too."""
        self.seen = self.seen or Finding("reach", what)
        raise self.seen


def _full(path: Any, folder: Any) -> Any:
    """The path, if it is relative to a folder that is open."""
    relative = isinstance(folder, int) and folder >= 0 and not isinstance(path, int)
    return f"/proc/self/fd/{folder}/{os.fsdecode(path)}" if relative else path


_HOOK = _Hook()


class Watch:
    """Runs a decoder under all detectors: it may write `folder`, say no with what is `allowed`, and take so much memory."""

    def __init__(
        self,
        folder: Path,
        allowed: tuple[type[BaseException], ...],
        memory_bytes: int,
        seconds: float,
        told: int | None = None,
    ) -> None:
        self._folder = os.path.realpath(folder)
        self._allowed = allowed
        self._memory_bytes = memory_bytes
        self._seconds = seconds
        self._told = told
        _HOOK.install()

    def __call__(self, decode: Callable[[bytes], None], data: bytes) -> None:
        """Decode. Raises Finding."""
        try:
            with self._reach(), _held_to(self._memory_bytes), _within(self._seconds):
                decode(data)
        except self._allowed as error:
            self._check_causes(error)
            self._check_words(error)
        except Finding:
            raise
        except MemoryError as error:
            raise Finding("memory", f"over {self._memory_bytes >> 20} MiB asked for", where(error)) from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            kind = "memory" if _is_memory(error) else "crash"
            raise Finding(kind, f"{type(error).__name__} ({_short(error)})", where(error)) from error

    def _check_causes(self, error: BaseException | None) -> None:
        """Memory that was asked for counts also where the decoder made an orderly refusal of it."""
        while error is not None:
            if _is_memory(error):
                raise Finding("memory", f"over {self._memory_bytes >> 20} MiB asked for", where(error))
            error = error.__cause__ or error.__context__

    def _check_words(self, error: BaseException) -> None:
        if self._told is not None and len(str(error)) > self._told:
            raise Finding("words", f"{len(str(error))} characters told by a {type(error).__name__}", where(error))

    @contextmanager
    def _reach(self) -> Iterator[None]:
        outside = os.path.dirname(self._folder)  # noqa: PTH120
        before = os.listdir(outside)  # noqa: PTH208
        _HOOK.seen, _HOOK.folder = None, self._folder
        try:
            with _no_pickle():
                yield
        finally:
            _HOOK.folder = None
            if _HOOK.seen is not None:
                raise _HOOK.seen
            if os.listdir(outside) != before:  # noqa: PTH208 - what is not written by Python meets no hook
                raise Finding("reach", f"something appeared beside {self._folder}")


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)  # torch's own word for it


def _short(error: BaseException) -> str:
    with suppress(Exception):
        return " ".join(str(error).split())[:150]
    return "nothing that can be shown"


def where(error: BaseException) -> str:
    """The innermost line of our own that the error went through, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/choral" in frame.filename and "site-packages" not in frame.filename]
    told = [*ours[-1:], *frames[-1:]]
    return " < ".join(dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(told)))


@contextmanager
def _no_pickle() -> Iterator[None]:
    """Let every door to pickle be a wall: `pickle.find_class` tells only of those that name a class."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        _HOOK.refuse("a pickle is read")

    doors = {name: getattr(pickle, name) for name in ("load", "loads", "Unpickler")}
    for name in doors:
        setattr(pickle, name, refuse)
    try:
        yield
    finally:
        for name, door in doors.items():
            setattr(pickle, name, door)


@contextmanager
def _held_to(more_bytes: int) -> Iterator[None]:
    """No more than so much above what the process has now. Raises MemoryError in whatever asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[5])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises Finding after so many seconds, if this is the main thread: no other gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(_number: int, frame: FrameType | None) -> NoReturn:
        raise Finding("time", f"over {seconds:g} s", _line_of(frame))

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with suppress(TypeError):  # it was set by C code
            signal.signal(signal.SIGALRM, before)


def _line_of(frame: FrameType | None) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}" if frame is not None else "C code"

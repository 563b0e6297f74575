"""Every error that a user or a peer can meet.

    ChoralError
    ├── ConfigError          a configuration file or flag is wrong
    ├── TaskError            task code cannot be found, or raised
    │   └── TaskProcessGone      the process that runs it has ended             (try again)
    ├── DataError            a shard or test set cannot be used
    ├── AddressError         an address cannot be listened on
    ├── TrustError           a certificate or key cannot be used
    ├── Unreachable          nobody answers at the address                      (try again)
    ├── CorruptTransfer      bytes arrived damaged, out of order or incomplete   (try again)
    ├── ArtifactsGone        the store of versions does not answer               (try again)
    ├── UnknownArtifact      nothing is kept under that key
    ├── OutOfSpace           a disk is full                                      (try again)
    ├── DatabaseGone         the database does not answer                        (try again)
    ├── LeaseLost            another coordinator has taken over the database
    ├── HistoryBroken        the history is not what was signed, or not all of it
    ├── Declined             this client will not do the assignment
    │   └── Deceived             what others do in secure aggregation would reveal this client's update
    └── Refused              the coordinator said no
        ├── Unauthenticated      no certificate, or none that the coordinator accepts
        ├── Revoked              the certificate's owner does not belong any more
        ├── NotAllowed           the caller's role does not allow it, or it is another's
        ├── TokenRefused         an enrolment token that is not valid, or not any more
        ├── LimitExceeded        more, or more at once, than anyone may       (try again)
        ├── ProtocolMismatch     the two sides speak different versions
        ├── TaskMismatch         another task, or another version of it
        ├── ManifestMismatch     the same task with a different model
        ├── NameTaken            another client attends under this name
        ├── InvalidMessage       a message breaks the contract
        ├── UnknownVersion       no such model version
        ├── WrongState           not possible in the run's present state
        └── UpdateRefused        an upload that cannot count

A message names the thing, the value and the cure. Each class says which gRPC status it travels as, whether trying again
can help, and the exit code of a process that ends with it.
"""

from __future__ import annotations

from typing import ClassVar


class ChoralError(Exception):
    """Anything that went wrong in a way that has a name."""

    grpc_code: ClassVar[str] = "UNKNOWN"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class ConfigError(ChoralError):
    """A configuration file, key or flag is wrong."""

    grpc_code = "INVALID_ARGUMENT"
    exit_code = 2


class TaskError(ChoralError):
    """Task code cannot be found, or it raised."""

    exit_code = 3


class TaskProcessGone(TaskError):
    """The process that runs the task's code ended before it had done what it was asked."""

    retryable = True


class DataError(ChoralError):
    """A shard or a test set cannot be used."""

    exit_code = 4


class AddressError(ChoralError):
    """An address cannot be listened on."""

    exit_code = 5


class TrustError(ChoralError):
    """A certificate or key cannot be used."""

    exit_code = 6


class Unreachable(ChoralError):
    """Nobody answers at the address, or the link broke."""

    grpc_code = "UNAVAILABLE"
    retryable = True
    exit_code = 7


class CorruptTransfer(ChoralError):
    """Bytes arrived damaged, out of order or incomplete."""

    grpc_code = "DATA_LOSS"
    retryable = True


class ArtifactsGone(ChoralError):
    """The store of versions does not answer, or does not take them."""

    grpc_code = "UNAVAILABLE"
    retryable = True


class UnknownArtifact(ChoralError):
    """Nothing is kept under that key."""

    grpc_code = "NOT_FOUND"


class OutOfSpace(ChoralError):
    """A disk is full, or cannot be written."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class DatabaseGone(ChoralError):
    """The coordinator's database does not answer at present."""

    grpc_code = "UNAVAILABLE"
    retryable = True


class LeaseLost(ChoralError):
    """Another coordinator has taken over the database; this one must end."""

    grpc_code = "UNAVAILABLE"
    exit_code = 9


class HistoryBroken(ChoralError):
    """The history is not what the coordinator signed, not all of it, or another's."""

    exit_code = 10


class Declined(ChoralError):
    """This client will not do the assignment; the message is sent to the coordinator."""


class Deceived(Declined):
    """In secure aggregation, what the coordinator says, or others say through it, would reveal this client's update."""


class Refused(ChoralError):
    """The coordinator said no."""

    grpc_code = "FAILED_PRECONDITION"
    exit_code = 8


class Unauthenticated(Refused):
    """The caller shows no certificate, or none that the coordinator accepts."""

    grpc_code = "UNAUTHENTICATED"


class Revoked(Refused):
    """The certificate's owner does not belong any more."""

    grpc_code = "PERMISSION_DENIED"


class NotAllowed(Refused):
    """The caller's role does not allow it, or what it asks for is another's."""

    grpc_code = "PERMISSION_DENIED"


class TokenRefused(Refused):
    """An enrolment token is not valid, or not any more."""

    grpc_code = "UNAUTHENTICATED"


class LimitExceeded(Refused):
    """More, or more at once, than anyone may ask for."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class ProtocolMismatch(Refused):
    """The two sides speak different versions of the contract."""


class TaskMismatch(Refused):
    """The client has another task, or another version of it."""


class ManifestMismatch(Refused):
    """The client has the same task with a different model."""


class NameTaken(Refused):
    """Another client attends under this name."""

    grpc_code = "ALREADY_EXISTS"


class InvalidMessage(Refused):
    """A message breaks the contract."""

    grpc_code = "INVALID_ARGUMENT"


class UnknownVersion(Refused):
    """No such model version."""

    grpc_code = "NOT_FOUND"


class WrongState(Refused):
    """Not possible in the run's present state."""


class UpdateRefused(Refused):
    """An upload that cannot count."""


def by_name(name: str) -> type[ChoralError]:
    """The class of that name, or `Refused` for a name that this release does not know."""
    return _BY_NAME.get(name, Refused)


def _leaves(root: type[ChoralError]) -> dict[str, type[ChoralError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _leaves(child)
    return found


_BY_NAME = _leaves(ChoralError)

"""The coordinator's configuration file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from choral.address import Address
from choral.config import Settings, read
from choral.plan import Training
from pydantic import AfterValidator, Field, model_validator

from choral_server.objective import Objective
from choral_server.schedule import Schedule
from choral_server.strategies import ServerOptimizer

FilePath = Annotated[Path, Field(strict=False)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) or value.startswith("."):
        raise ValueError("1 to 64 letters, digits, dots, dashes and underscores, not beginning with a dot")
    return value


class Tls(Settings):
    """The certificate that the coordinator shows."""

    certificate: FilePath
    """PEM file with the server's certificate"""
    key: FilePath
    """PEM file with its private key"""


class TrainingChanges(Settings):
    """Hyper-parameters that differ from the task's own."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """passes over the local examples each round; 0 sends the model back unchanged; the task's own number, if not given"""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """examples per optimizer step; the task's own number, if not given"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """the optimizer's step size; the task's own, if not given"""

    def over(self, defaults: Training) -> Training:
        """The task's defaults with these changes."""
        return defaults.model_copy(update=self.model_dump(exclude_none=True))


class RunSettings(Settings):
    """One run: a task trained for a number of rounds."""

    name: Annotated[str, AfterValidator(_name)] = "run"
    """name of the run and of its folder in the state folder"""
    rounds: Annotated[int, Field(ge=1)]
    """training rounds to complete"""
    seed: int = 0
    """seed of the initial weights, of cohort selection and of the clients' shuffling"""
    cohort_size: Annotated[int, Field(ge=1, le=10_000)]
    """results wanted per round: the aggregation goal"""
    quorum: Annotated[int, Field(ge=1)] | None = None
    """results without which a round is abandoned, and clients without which none is opened; cohort_size if not given"""
    start_with: Annotated[int, Field(ge=1)] | None = None
    """clients that must attend before the first round opens; the quorum if not given"""
    over_selection: Annotated[float, Field(ge=0, le=10)] = 0.0
    """share by which more clients are asked than results are wanted, for example 0.3"""
    deadline_s: Seconds = 600.0
    """seconds after which a round closes with what it has, apart from transfers that advance"""
    extension_s: Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)] | None = None
    """by how many seconds transfers that advance can move the deadline at most; by deadline_s, if not given"""
    stall_s: Seconds = 30.0
    """seconds without a byte after which a transfer stands still: an upload is cut off, and its client goes on where it broke"""
    absence_s: Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)] = 10.0
    """seconds for which a client may be away from its part before it is not waited for, and another is asked in its place"""
    max_update_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """largest Euclidean norm of an update that is accepted; any, if not given"""
    quarantine_after: Annotated[int, Field(ge=1)] | None = 3
    """results refused in a row after which a client is quarantined until an operator releases it; null: never"""
    weight_cap: Annotated[int, Field(ge=1, le=2**40)] = 2**20
    """examples at which a client's weight is capped"""
    max_abandoned: Annotated[int, Field(ge=1)] = 10
    """abandoned rounds in a row after which the run stops and waits for an operator"""
    retry_s: Annotated[float, Field(ge=0, le=86_400)] = 1.0
    """seconds between an abandoned round and the next"""
    keep_versions: Annotated[int, Field(ge=1)] | None = None
    """how many of the newest versions stay on disk, besides the best; all, if not given"""
    schedule: Schedule = Schedule()
    """when rounds open; as soon as a quorum attends, if not given"""
    strategy: ServerOptimizer = ServerOptimizer()
    """how the mean of the updates becomes the next model"""
    training: TrainingChanges = TrainingChanges()
    """changes to the task's hyper-parameters"""
    objective: Objective = Objective()
    """which version is best, and early stopping"""

    @property
    def needed(self) -> int:
        """The quorum in force."""
        return self.quorum if self.quorum is not None else self.cohort_size

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.quorum is not None and self.quorum > self.cohort_size:
            raise ValueError(f"quorum {self.quorum} is more than cohort_size {self.cohort_size}; it can be at most that")
        return self


class Evaluation(Settings):
    """How versions are measured."""

    test_set: FilePath | None = None
    """a shard that the coordinator holds, loaded by the task; every version is measured on it"""
    clients: bool = True
    """whether clients measure each version on their held-out examples"""


class ServerConfig(Settings):
    """The whole file."""

    listen: Address
    """host:port for clients, for example 0.0.0.0:8470; port 0 takes any free port"""
    tls: Tls | None = None
    """certificate and key; `choral server init` makes them"""
    plaintext: bool = False
    """serve without TLS; allowed on loopback addresses only"""
    state: FilePath
    """folder for the database, versions, uploads under way and the operators' socket"""
    database: str | None = None
    """URL of the database: postgresql://user@host/name, sqlite:///path, or sqlite:// (in memory: nothing survives); choral.db in
    the state folder, if not given"""
    lease_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 30.0
    """seconds after which another coordinator may take over the database from one that is silent"""
    artifacts: str | None = None
    """URL of the object store for versions, s3://bucket/prefix; the state folder, if not given"""
    spool_bytes: Annotated[int, Field(ge=0)] = 2**30
    """bytes of updates kept on disk after they were added, before the sum itself is written and they are deleted"""
    task: str
    """module:attribute of the task"""
    run: RunSettings
    """the run"""
    evaluation: Evaluation = Evaluation()
    """how versions are measured"""
    heartbeat_s: Annotated[float, Field(ge=0.1, le=3600)] = 15.0
    """seconds after which a client says that it is alive; silent for three of these, it has left"""
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 8.0
    """seconds that a round under way gets to end after SIGTERM"""
    exit_when_done: bool = False
    """end the process when the run is over, instead of waiting for an operator"""

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.tls is None and not self.plaintext:
            raise ValueError("tls is missing: give tls.certificate and tls.key (`choral server init` makes them)")
        if self.plaintext and self.tls is not None:
            raise ValueError("plaintext: true contradicts tls: remove one of them")
        if self.plaintext and not self.listen.is_loopback:
            raise ValueError(f"plaintext: true is allowed on loopback only, not on {self.listen.host}: give tls")
        objective = self.run.objective
        if objective.on == "test" and self.evaluation.test_set is None:
            raise ValueError("run.objective.on is test, but there is no evaluation.test_set: give one, or say clients")
        if objective.on == "clients" and not self.evaluation.clients:
            raise ValueError("run.objective.on is clients, but evaluation.clients is false: change one of them")
        if objective.patience_rounds is not None and self.evaluation.test_set is None and not self.evaluation.clients:
            raise ValueError("run.objective.patience_rounds needs a measurement: give evaluation.test_set or evaluation.clients")
        return self

    @property
    def database_url(self) -> str:
        """The database in force."""
        return self.database if self.database is not None else f"sqlite:///{(self.state / 'choral.db').resolve()}"

    @property
    def admin_socket(self) -> Path:
        """Where operators are served."""
        return self.state / "admin.sock"


def load(path: Path) -> ServerConfig:
    """Read the file; relative paths in it count from its folder. Raises ConfigError."""
    config = read(path, ServerConfig)
    home = path.resolve().parent
    tls = config.tls and Tls(certificate=home / config.tls.certificate, key=home / config.tls.key)
    test_set = config.evaluation.test_set and home / config.evaluation.test_set
    evaluation = config.evaluation.model_copy(update={"test_set": test_set})
    database = config.database
    if database is not None and (relative := database.removeprefix("sqlite:///")) not in (database, ""):
        database = f"sqlite:///{home / relative}"
    changes = {"tls": tls, "state": home / config.state, "evaluation": evaluation, "database": database}
    return config.model_copy(update=changes)

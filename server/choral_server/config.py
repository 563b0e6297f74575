"""The coordinator's configuration file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from choral.address import Address, HostPort
from choral.codecs import FLOAT32, LARGEST_SHARE, LEAST_SHARE, Codec, TopK, Zstd, abilities, parse
from choral.config import Settings, read
from choral.names import ALLOWED, is_name
from choral.plan import Training
from choral.wire import CHUNK_BYTES, MESSAGE_BYTES
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from choral_server.example_privacy import ExamplePrivacy
from choral_server.objective import Objective
from choral_server.privacy import Privacy
from choral_server.schedule import Schedule
from choral_server.secure_aggregation import SecureAggregation, switched
from choral_server.strategies import ServerOptimizer

FilePath = Annotated[Path, Field(strict=False)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
_TOPK_SHARE = 0.05
_WEIGHT_CAP, _SECURE_WEIGHT_CAP = 2**20, 2**10  # examples


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) or value.startswith("."):
        raise ValueError("1 to 64 letters, digits, dots, dashes and underscores, not beginning with a dot")
    return value


def _member(value: str) -> str:
    if not is_name(value):
        raise ValueError(ALLOWED)
    return value


Names = Annotated[tuple[Annotated[str, AfterValidator(_member)], ...], Field(strict=False)]


class Tls(Settings):
    """The certificate that the coordinator shows, and whose certificates it accepts."""

    certificate: FilePath
    """PEM file with the server's certificate"""
    key: FilePath
    """PEM file with its private key"""
    ca: FilePath
    """PEM file with the certificate of the authority that signs those of clients and operators"""
    ca_key: FilePath | None = None
    """PEM file with that authority's private key, with which the coordinator enrols; if not given, certificates come from an
    authority of yours, and the common name of each is a name here"""
    operators: Names = ()
    """without ca_key: the names of operators, who may do everything that is asked of the coordinator"""
    viewers: Names = ()
    """without ca_key: the names of those who may look; every other name is a device's"""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.ca_key is not None and (self.operators or self.viewers):
            raise ValueError("tls.operators and tls.viewers are for an authority of yours; with tls.ca_key, roles come with tokens")
        if both := set(self.operators) & set(self.viewers):
            raise ValueError(f"{', '.join(sorted(both))}: in tls.operators and in tls.viewers; an operator may look as it is")
        return self


class Enrolment(Settings):
    """How devices and operators come to belong."""

    listen: Address | None = None
    """host:port where tokens are turned into certificates; the host of listen and the port after it, if not given"""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """the port that tokens name, if clients reach it under another than the one listened on, as behind a port mapping"""
    certificate_s: Annotated[float, Field(ge=1, le=315_360_000, allow_inf_nan=False)] = 7_776_000.0
    """seconds for which a client's certificate is valid; clients renew it by themselves when a third of that is left"""


class Limits(Settings):
    """What anyone may cost. Who goes beyond is refused, and the others go on."""

    message_bytes: Annotated[int, Field(ge=65_536, le=67_108_864)] = MESSAGE_BYTES
    """longest message from a client"""
    chunk_bytes: Annotated[int, Field(ge=262_144, le=CHUNK_BYTES)] = CHUNK_BYTES
    """longest chunk of an upload"""
    metadata_bytes: Annotated[int, Field(ge=2048, le=1_048_576)] = 8192
    """longest metadata of a call"""
    connections: Annotated[int, Field(ge=1, le=1_000_000)] = 12_000
    """connections that clients and operators may have open, and those who have not shown a certificate yet"""
    enrolment_connections: Annotated[int, Field(ge=1, le=100_000)] = 64
    """connections open at the address where tokens are turned into certificates"""
    enrolments_per_s: Annotated[float, Field(gt=0, le=10_000)] = 20.0
    """attempts to enrol that are looked at; the others are refused unread"""
    handshake_s: Annotated[float, Field(gt=0, le=120)] = 5.0
    """seconds in which a connection must have shown its certificate"""
    calls: Annotated[int, Field(ge=2, le=1000)] = 16
    """calls that one client may have open at once"""
    calls_per_s: Annotated[float, Field(gt=0, le=100_000)] = 500.0
    """calls that one client may begin in a second, on the average; ten seconds' worth may come at once"""
    transfer_bytes: Annotated[int, Field(ge=1_048_576, le=2**40)] = 33_554_432
    """bytes of transfers under way, each with what it moved in the last 0.25 s, at most 8 MiB; the others wait for their turn"""
    idle_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """seconds for which a connection may be open without a call on it"""
    first_message_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """seconds in which a call must have said its first word"""
    unread: Annotated[int, Field(ge=8, le=100_000)] = 256
    """messages that may wait for a client that does not read what it is told"""
    sessions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """clients that may attend at once; the others are told when to come back, and clients that have had their turn make place; five
    sixths of connections, if not given"""
    returns_per_s: Annotated[float, Field(gt=0, le=100_000)] = 50.0
    """clients sent away that come back in a second, on the average: few come together, many one after the other"""
    heartbeats_per_s: Annotated[float, Field(gt=0, le=1_000_000)] = 100.0
    """heartbeats wanted in a second; when so many attend that there would be more, those who join are asked for fewer"""

    @property
    def places(self) -> int:
        """How many clients may attend at once."""
        return self.sessions if self.sessions is not None else max(1, self.connections * 5 // 6)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.sessions is not None and self.sessions > self.connections:
            raise ValueError(f"sessions {self.sessions} is more than connections {self.connections}; it can be at most that")
        return self


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


class Compression(Settings):
    """In how few bytes updates and versions are sent. Who cannot do it sends and fetches them as they are."""

    upload: Literal["none", "bf16", "int8", "topk"] = "none"
    """how clients encode updates: none, 4 bytes an element; bf16, 2; int8, a little more than 1; topk, the largest elements only,
    and what is left out is added to the client's next update"""
    topk_share: Annotated[float, Field(ge=LEAST_SHARE, le=LARGEST_SHARE)] | None = None
    """for upload: topk, the share of the elements that is sent; 0.05, if not given"""
    zstd: bool = False
    """compress what upload gives with Zstandard, which changes no number; needs the extra choral[compression]"""

    download: Literal["none", "bf16", "delta"] = "none"
    """in what clients fetch versions: none, the checkpoint file; bf16, rounded to half as many bytes, from which they then train;
    delta, the difference to the version before, which changes no bit, for those that have that version; needs the extra
    choral[compression]"""

    @property
    def codec(self) -> Codec:
        """What clients are asked for that can do it."""
        share = _TOPK_SHARE if self.topk_share is None else self.topk_share
        base: Codec = TopK(share) if self.upload == "topk" else parse(self.upload.replace("none", ""))
        return Zstd(base) if self.zstd else base

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.topk_share is not None and self.upload != "topk":
            raise ValueError(f"topk_share is for upload: topk, and upload is {self.upload}: remove one of them")
        wanted = self.codec.abilities | ({"zstd"} if self.download == "delta" else set())
        if missing := wanted - set(abilities()):
            raise ValueError(f"{', '.join(sorted(missing))} needs the extra compression: pip install 'choral[compression]'")
        return self


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
    weight_cap: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """examples at which a client's weight is capped; 1048576 if not given, or 1024 with secure aggregation, which in 32 bits cannot
    tell a client with few examples as finely beside one with many"""
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
    compression: Compression = Compression()
    """in how few bytes updates and versions are sent"""
    secure_aggregation: Annotated[SecureAggregation | None, BeforeValidator(switched)] = None
    """sum results so that the coordinator sees nothing but the sum: true, or what is to differ from the defaults; false or nothing
    given, each is sent as it is"""
    privacy: Privacy | None = None
    """clip updates, add noise to their sum, and keep within a budget; needs the extra choral[privacy]; none of it, if not
    given"""
    example_privacy: ExamplePrivacy | None = None
    """hide each single example in what clients train, within a budget that each keeps itself, for which it needs the extra
    choral[privacy]; none of it, if not given"""

    @property
    def cap(self) -> int:
        """The weight cap in force."""
        if self.weight_cap is not None:
            return self.weight_cap
        if self.privacy is not None:
            return 1
        return _WEIGHT_CAP if self.secure_aggregation is None else _SECURE_WEIGHT_CAP

    @property
    def needed(self) -> int:
        """The quorum in force."""
        return self.quorum if self.quorum is not None else self.cohort_size

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.quorum is not None and self.quorum > self.cohort_size:
            raise ValueError(f"quorum {self.quorum} is more than cohort_size {self.cohort_size}; it can be at most that")
        if self.max_update_norm is not None and self.compression.codec.sparse:
            raise ValueError(
                "max_update_norm contradicts compression.upload: topk, whose updates carry what earlier ones left out, too, and "
                "may be longer than any that was trained: remove max_update_norm, or take upload: int8"
            )
        if self.privacy is not None and self.example_privacy is not None:
            raise ValueError(
                "privacy contradicts example_privacy: what hides all that a client has hides each example of it, too, and "
                "noise for both would be paid for twice: take one of the two"
            )
        if self.privacy is not None:
            others = self.weight_cap, self.over_selection, self.max_update_norm, self.secure_aggregation is not None
            self.privacy.must_suit(*others)
        if (secure := self.secure_aggregation) is not None:
            if self.compression.codec is not FLOAT32:
                raise ValueError(
                    f"compression.upload: {self.compression.codec.name} contradicts secure_aggregation: masks do not cancel in "
                    "what is rounded or left out: remove it; compression.download: delta goes with it"
                )
            if self.compression.download == "bf16":
                raise ValueError(
                    "compression.download: bf16 contradicts secure_aggregation, in which clients sign the digest of the version "
                    "that they train from, and what is rounded has another: take download: delta, which changes no bit"
                )
            secure.must_suit(self.cohort_size, self.needed, self.cap, private=self.privacy is not None)
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
    """certificates and keys; `choral server init` makes them"""
    enrolment: Enrolment | None = None
    """how members are enrolled; needs tls.ca_key"""
    limits: Limits = Limits()
    """what anyone may cost"""
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
    spool_bytes: Annotated[int, Field(ge=0)] = 2**32
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
            raise ValueError(
                "tls is missing: give tls.certificate, tls.key, tls.ca and tls.ca_key (`choral server init` makes them)"
            )
        if self.enrolment is not None and (self.tls is None or self.tls.ca_key is None):
            raise ValueError("enrolment needs the key of an authority: give tls.ca_key, or remove enrolment")
        if self.tls is not None and self.tls.ca_key is not None and self.enrolment_address is None:
            raise ValueError(f"enrolment.listen is missing: there is no port after {self.listen.port}")
        if self.plaintext and self.tls is not None:
            raise ValueError("plaintext: true contradicts tls: remove one of them")
        if self.plaintext and not self.listen.is_loopback:
            raise ValueError(f"plaintext: true is allowed on loopback only, not on {self.listen.host}: give tls")
        wanted = max(self.run.needed, self.run.start_with or 0)
        if wanted > self.limits.places:
            raise ValueError(
                f"a round waits for {wanted} clients (run.quorum, run.start_with), and only {self.limits.places} may attend at "
                "once: raise limits.sessions, and limits.connections with it, or lower those"
            )
        objective = self.run.objective
        if objective.on == "test" and self.evaluation.test_set is None:
            raise ValueError("run.objective.on is test, but there is no evaluation.test_set: give one, or say clients")
        if objective.on == "clients" and not self.evaluation.clients:
            raise ValueError("run.objective.on is clients, but evaluation.clients is false: change one of them")
        if objective.patience_rounds is not None and self.evaluation.test_set is None and not self.evaluation.clients:
            raise ValueError("run.objective.patience_rounds needs a measurement: give evaluation.test_set or evaluation.clients")
        if self.run.example_privacy is not None and self.evaluation.clients:
            raise ValueError(
                "evaluation.clients with run.example_privacy: what clients measure is computed from single examples, and has no "
                "noise: say evaluation.clients: false, and give evaluation.test_set if you can"
            )
        private = self.run.privacy
        if private is not None and self.evaluation.clients and private.metrics is None:
            raise ValueError(
                "evaluation.clients with run.privacy: what clients measure tells of their data, too: give run.privacy.metrics, the "
                "range of each metric, and it gets noise; or evaluation.clients: false"
            )
        if private is not None and not self.evaluation.clients and private.metrics is not None:
            raise ValueError("run.privacy.metrics is for what clients measure, and evaluation.clients is false: remove one of them")
        return self

    @property
    def database_url(self) -> str:
        """The database in force."""
        return self.database if self.database is not None else f"sqlite:///{(self.state / 'choral.db').resolve()}"

    @property
    def enrolment_address(self) -> HostPort | None:
        """Where tokens are turned into certificates; None: nowhere."""
        if self.tls is None or self.tls.ca_key is None:
            return None
        if self.enrolment is not None and self.enrolment.listen is not None:
            return self.enrolment.listen
        port = self.listen.port and self.listen.port + 1
        return HostPort(self.listen.host, port) if port <= 65535 else None

    @property
    def admin_socket(self) -> Path:
        """Where operators are served."""
        return self.state / "admin.sock"


def load(path: Path) -> ServerConfig:
    """Read the file; relative paths in it count from its folder. Raises ConfigError."""
    config = read(path, ServerConfig)
    home = path.resolve().parent
    tls = config.tls and config.tls.model_copy(update={name: home / path for name, path in config.tls if isinstance(path, Path)})
    test_set = config.evaluation.test_set and home / config.evaluation.test_set
    evaluation = config.evaluation.model_copy(update={"test_set": test_set})
    database = config.database
    if database is not None and (relative := database.removeprefix("sqlite:///")) not in (database, ""):
        database = f"sqlite:///{home / relative}"
    changes = {"tls": tls, "state": home / config.state, "evaluation": evaluation, "database": database}
    return config.model_copy(update=changes)

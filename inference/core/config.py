"""The configuration: one TOML file, parsed once into frozen types. Its SHA-256 is in the evidence.

Every field that decides about secrecy must be written out: no operator can get a default by omitting a line.
"""

import difflib
import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from adytum.attestation.core.ed25519 import small_order
from adytum.inference.channel.exchange import Shape
from adytum.inference.channel.padding import Padding
from adytum.inference.channel.shaping import LARGEST, SMALLEST, Cells

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:+-]{0,199}$")]


_OVERLAPS = 100
"""The longest overlap, in lifetimes of a key: `keys.GENERATIONS` less the newest and some room."""


class ConfigError(Exception):
    """The configuration cannot be used. The message names the line to change, and how to change it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ServerSection(_Section):
    """Where the backend listens."""

    host: str
    """An address of this machine. Without TLS only loopback is accepted."""
    port: int = Field(ge=0, le=65535)
    """0 lets the kernel choose."""
    replica: Annotated[str, StringConstraints(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
    """Name of this backend among others behind one balancer. It is part of the gateway path."""
    max_requests: int = Field(default=1024, ge=1)
    """Requests in progress; one more is answered 503."""
    max_connections: int = Field(default=8192, ge=1)
    """Open connections; one more is closed at once."""
    max_upload_mib: int = Field(default=1024, ge=64)
    """MiB that all requests together may hold while they arrive; one more is answered 503."""
    request_seconds: float = Field(default=120, gt=0)
    """Time for a request's body to arrive."""
    swap: Literal["refused", "allowed"] = "refused"
    """Whether the backend starts on a machine that can write memory to a disk."""
    log: Literal["text", "json"] = "text"
    """Lines for people, or JSON lines (docs/reference/telemetry.md), on stderr."""
    drain_seconds: float = Field(default=30, ge=0)
    """After SIGTERM, the time for answers in progress to end."""


class TlsSection(_Section):
    """TLS of the outer connection. The sealed channel does not rely on it."""

    mode: Literal["off", "files", "generated"]
    """"files": certificate and key below. "generated": a key made at start, whose hash is in the evidence."""
    certificate: Path | None = None
    """PEM, the chain included."""
    key: Path | None = None
    """PEM."""
    names: tuple[str, ...] = ()
    """DNS names of a generated certificate."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.mode == "files") != (self.certificate is not None and self.key is not None):
            raise ValueError('mode = "files" needs certificate and key, and only it has them')
        if self.mode == "generated" and not self.names:
            raise ValueError('mode = "generated" needs names, the host names of the certificate')
        return self


class CallersSection(_Section):
    """The callers."""

    authentication: Literal["none", "keys", "file"]
    """"none": everyone. "keys": the API keys below. "file": the signed list below."""
    key_sha256: frozenset[Digest] = frozenset()
    """SHA-256 of each accepted API key, in hexadecimal: `printf %s KEY | sha256sum`. These have no limits."""
    file: Path | None = None
    """A signed list of callers with limits (docs/how-to/callers.md), read again when it changes, and on SIGHUP."""
    signed_by: Digest | None = None
    """The Ed25519 public key, in hexadecimal, of the list's signer (`adytum callers signing-key`)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.authentication == "keys") != bool(self.key_sha256):
            raise ValueError('authentication = "keys" needs at least one key_sha256, and only it has them')
        if (self.authentication == "file") != (self.file is not None and self.signed_by is not None):
            raise ValueError('authentication = "file" needs file and signed_by, and only it has them')
        if self.signed_by is not None and small_order(bytes.fromhex(self.signed_by)):
            raise ValueError(
                "signed_by is an invalid key, for which anyone can sign. `adytum callers signing-key` makes a valid one"
            )
        return self


class ChannelSection(_Section):
    """The sealed channel."""

    padding: Padding
    """What lengths and times reveal (docs/explanation/shaping.md). "constant" needs the three numbers that follow."""
    cadence_ms: float | None = Field(default=None, gt=0, le=10_000)
    """Between two chunks of an answer."""
    chunk_bytes: int | None = Field(default=None, ge=SMALLEST, le=LARGEST)
    """On the wire, framing included."""
    least_chunks: int | None = Field(default=None, ge=1, le=65_536)
    """Of the shortest answer. Longer answers have twice as many, four times as many, and so on."""
    key_lifetime_s: float = Field(gt=0)
    """After this time a new key is made and announced."""
    key_overlap_s: float = Field(ge=0)
    """The previous key is answered for this long, then erased."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.key_overlap_s / self.key_lifetime_s > _OVERLAPS:
            raise ValueError(
                f"key_overlap_s is at most {_OVERLAPS} times key_lifetime_s: all those keys are held at once"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = {self.cadence_ms is not None, self.chunk_bytes is not None, self.least_chunks is not None}
        if given != {self.padding is Padding.CONSTANT}:
            raise ValueError(
                'padding = "constant" needs cadence_ms, chunk_bytes and least_chunks, and only it has them'
            )
        return self

    @property
    def shape(self) -> Shape:
        """How the gateway shapes an answer's lengths and times."""
        if self.cadence_ms is None or self.chunk_bytes is None or self.least_chunks is None:
            return self.padding
        return Cells(self.chunk_bytes, self.least_chunks, self.cadence_ms / 1000)


class EvidenceSection(_Section):
    """The hardware that signs the evidence."""

    cpu: Literal["simulated", "sev-snp", "sev-snp-vtpm", "tdx"]
    """"simulated" proves nothing and clients refuse it unless told. "sev-snp-vtpm": behind Azure's paravisor."""
    gpus: Literal["none", "nvidia"]
    """"nvidia": every GPU of the machine is attested, and set ready only after this backend verified its evidence."""
    interval_s: float = Field(default=1.0, ge=0)
    """Between the starts of two hardware reports. Clients that ask in between share the next one."""
    round_nonces: int = Field(default=8192, ge=1, le=65_536)
    """Nonces that one report serves; one more is answered 503."""
    max_clients: int = Field(default=16_384, ge=1)
    """Clients that wait for evidence or read it; one more is answered 503."""


class EnginesSection(_Section):
    """Settings for all engines."""

    python: Path
    """The interpreter of the engines' own environment."""
    runtime_directory: Path
    """Sockets and logs; made with mode 0700."""
    sandbox: Literal["full", "none"]
    """"full": each engine sees only its model, its socket and loopback, or the backend does not start. The evidence
    shows "none"."""
    device: Literal["cpu", "cuda"]
    """Which build of vLLM runs: "cuda" needs a GPU."""
    gpu_memory: str | None = None
    """Memory of the GPU, for the plan: "80GB" is a card's nominal size, "81559MiB" is exact."""
    plan_length: int = Field(default=4096, ge=1)
    """Tokens per sequence that the plan assumes."""
    gpu_index: int = Field(default=0, ge=0)
    """Which of the machine's GPUs the engines get."""
    first_user: int = Field(default=64_000, ge=1000, le=65_000)
    """If the backend is root: the number of the first model's user and group. The next model has the next number."""
    canary: Literal["required", "off"]
    """"required": before an engine takes traffic, and every `canary_seconds` when it is idle, its answers are compared
    with golden ones (`adytum models canary`)."""
    ready_seconds: float = Field(default=300, gt=0)
    """For one engine, from start to the first answer of `/health`."""
    hung_seconds: float = Field(default=60, gt=0)
    """An engine that has a request and brings no byte for this long is restarted."""
    canary_seconds: float = Field(default=3600, gt=0)
    """Between two canary runs of an engine, the later ones only while it is idle."""


class MeteringSection(_Section):
    """What is kept of each request, for billing."""

    records: Path | None = None
    """The file to which a JSON line is appended for each request to an engine. Without it nothing is kept."""
    token_bucket: int = Field(default=16, ge=1)
    """Tokens are rounded up to a multiple of this: an exact length reveals something about the content."""


class TelemetrySection(_Section):
    """What operators see."""

    port: int | None = Field(default=None, ge=1, le=65535)
    """`GET /metrics` for Prometheus, on 127.0.0.1 only: its collector runs on this machine. Unset: none."""


class Model(_Section):
    """One model, one engine."""

    id: ModelId
    """The name in the API and in the evidence."""
    task: Literal["generate", "embed"]
    """"generate": chat and completions. "embed": embeddings."""
    source: str
    """A local folder (relative to where the backend is started) or a hub id."""
    revision: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")] | None = None
    """The commit of a hub id."""
    aliases: tuple[ModelId, ...] = ()
    """Further names that clients may use; unique over all models."""
    manifest: Path | None = None
    """The expected files (`adytum models lock`). Without it the files are hashed at start, and the evidence shows the
    root hash of what was found."""
    tool_parser: str | None = None
    """vLLM's parser for the model's tool calls: llama3_json, pythonic, ..."""
    arguments: tuple[str, ...] = ()
    """Further arguments for vLLM."""
    kv_cache_bytes: int | None = Field(default=None, gt=0)
    """Bytes of the KV cache. Without it, on a GPU, the plan decides (`adytum models plan`)."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """"auto": 16 bits for each number of the KV cache. "fp8": eight."""
    max_model_len: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer together."""
    max_num_seqs: int | None = Field(default=None, gt=0)
    """Sequences that are computed at a time; others wait in the engine."""
    max_requests: int = Field(default=256, ge=1)
    """Requests that its engine has, including those that wait in it; one more is answered 503."""
    max_tokens: int = Field(default=2_000_000, ge=1)
    """Tokens of all these requests, prompts and longest possible answers. A request beyond it is answered 503."""


class Config(_Section):
    """The whole configuration. `sha256` is the digest of the file's bytes."""

    server: ServerSection
    tls: TlsSection
    callers: CallersSection
    channel: ChannelSection
    evidence: EvidenceSection
    engines: EnginesSection
    metering: MeteringSection = MeteringSection()
    telemetry: TelemetrySection = TelemetrySection()
    models: tuple[Model, ...] = Field(min_length=1)
    sha256: bytes = Field(exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [name for model in self.models for name in (model.id, *model.aliases)]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"the model names {', '.join(doubled)} are given more than once")
        if self.tls.mode == "off" and self.server.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError('without TLS the backend listens on loopback only: set server.host = "127.0.0.1" or tls')
        return self


def load(path: Path) -> Config:
    """Parses a file. Raises `ConfigError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse(data, str(path))


def parse(data: bytes, name: str = "the configuration") -> Config:
    """Parses a file's bytes. Raises `ConfigError`."""
    try:
        values: dict[str, Any] = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    if "sha256" in values:
        raise ConfigError(f"{name}: sha256 is computed, remove it")
    try:
        return Config(**values, sha256=hashlib.sha256(data).digest())
    except ValidationError as error:
        raise ConfigError("\n".join(f"{name}: {_explain(item)}" for item in error.errors())) from error


def _explain(error: Any) -> str:
    line = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _names(error["loc"][:-1]), n=1, cutoff=0)
        return f"{line}: unknown name" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{line}: missing; it has no default and must be set"
    return f"{line}: {error['msg'].removeprefix('Value error, ')}"


def _names(path: tuple[int | str, ...]) -> list[str]:
    """The names that are valid at `path`."""
    section: type[BaseModel] = Config
    for part in path:
        if isinstance(part, str):
            annotation = Model if part == "models" else section.model_fields[part].annotation
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                return []
            section = annotation
    return [name for name in section.model_fields if name != "sha256"]

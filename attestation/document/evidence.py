"""The evidence document and the claims in it: types, canonical encoding, strict parsing. README.md has the format."""

from dataclasses import dataclass
from typing import Self

from adytum.attestation.core import strict
from adytum.attestation.core.errors import EvidenceError
from adytum.attestation.core.limits import LIMITS, Limits

TASKS = frozenset({"generate", "embed"})
PADDINGS = frozenset({"off", "pad", "constant"})
SANDBOXES = frozenset({"full", "none"})
CC_MODES = frozenset({"none", "off", "on", "devtools"})
"""Confidential computing of the GPUs; `none`: there is no GPU."""
NO_GPUS = b"[]"
"""The GPU evidence bundle of a machine without GPUs."""

_MODEL = frozenset({"aliases", "id", "task", "weights_root"})
_CLAIMS = frozenset(
    {
        "cc_mode",
        "configuration_sha256",
        "ehbp_key_configuration",
        "gateway_path",
        "issued_at",
        "key_configurations",
        "keys_expire_at",
        "models",
        "padding",
        "receipt_key",
        "replica",
        "sandbox",
        "software_version",
        "tls_spki_sha256",
        "version",
    }
)
_DOCUMENT = frozenset({"type", "version", "claims", "nonces", "cpu", "gpu", "collateral"})
_NONCES = frozenset({"root", "index", "size", "path"})
_CPU = frozenset({"provider", "report", "certificates"})
_COLLATERAL = frozenset({"crls", "ocsp", "rims", "tdx"})


@dataclass(frozen=True)
class ModelClaim:
    """One model that the backend serves."""

    id: str
    task: str
    aliases: tuple[str, ...]
    weights_root: bytes
    """Root hash of the manifest of the weights, 32 bytes."""


@dataclass(frozen=True)
class Claims:
    """What a backend says about itself. The hardware signs the hash of exactly these bytes."""

    key_configurations: bytes
    """The channel's keys: `application/ohttp-keys`, RFC 9458 section 3. Opaque here."""
    ehbp_key_configuration: bytes | None
    """The key of the second protocol; None if it is not offered."""
    receipt_key: bytes
    """Ed25519 public key of the receipts, 32 bytes (RFC 8032). Opaque here."""
    gateway_path: str
    replica: str
    tls_spki_sha256: bytes | None
    """SHA-256 of the TLS key's SubjectPublicKeyInfo; None if the backend does not use TLS."""
    models: tuple[ModelClaim, ...]
    configuration_sha256: bytes
    padding: str
    sandbox: str
    """"full": each engine sees its model, its socket and loopback only; "none": engines are not isolated."""
    software_version: str
    cc_mode: str
    issued_at: int
    """Seconds since 1970, like `keys_expire_at`."""
    keys_expire_at: int

    def encode(self) -> bytes:
        """The canonical bytes. Raises `EvidenceError` for claims that no verifier would accept."""
        data = strict.encode(
            {
                "version": 1,
                "key_configurations": strict.base64_text(self.key_configurations),
                "ehbp_key_configuration": None
                if self.ehbp_key_configuration is None
                else strict.base64_text(self.ehbp_key_configuration),
                "receipt_key": self.receipt_key.hex(),
                "gateway_path": self.gateway_path,
                "replica": self.replica,
                "tls_spki_sha256": None if self.tls_spki_sha256 is None else self.tls_spki_sha256.hex(),
                "models": [
                    {
                        "id": model.id,
                        "task": model.task,
                        "aliases": list(model.aliases),
                        "weights_root": model.weights_root.hex(),
                    }
                    for model in self.models
                ],
                "configuration_sha256": self.configuration_sha256.hex(),
                "padding": self.padding,
                "sandbox": self.sandbox,
                "software_version": self.software_version,
                "cc_mode": self.cc_mode,
                "issued_at": self.issued_at,
                "keys_expire_at": self.keys_expire_at,
            }
        )
        Claims.parse(data)
        return data

    @classmethod
    def parse(cls, data: bytes, limits: Limits = LIMITS) -> Self:
        """Reads claims. Raises `EvidenceError`."""
        fields = strict.Fields(strict.decode(data, "claims", limits.claims), "claims", _CLAIMS)
        fields.constant("version", 1)
        models = fields.items("models", limits.models, lambda value, where: _model(value, where, limits))
        if not models:
            raise EvidenceError("claims.models is empty")
        names = [name for model in models for name in (model.id, *model.aliases)]
        if len(set(names)) != len(names):
            raise EvidenceError("claims.models uses one name for two models, or twice for one")
        key_configurations = fields.octets("key_configurations", limits.key_configurations)
        if not key_configurations:
            raise EvidenceError("claims.key_configurations is empty")
        ehbp = None
        if fields.raw("ehbp_key_configuration") is not None:
            ehbp = fields.octets("ehbp_key_configuration", limits.key_configurations)
            if not ehbp:
                raise EvidenceError("claims.ehbp_key_configuration is empty; write null if there is none")
        path = fields.text("gateway_path", limits.text)
        if not path.startswith("/"):
            raise EvidenceError("claims.gateway_path does not begin with /")
        return cls(
            key_configurations=key_configurations,
            ehbp_key_configuration=ehbp,
            receipt_key=fields.digest("receipt_key"),
            gateway_path=path,
            replica=fields.text("replica", limits.text),
            tls_spki_sha256=None if fields.raw("tls_spki_sha256") is None else fields.digest("tls_spki_sha256"),
            models=models,
            configuration_sha256=fields.digest("configuration_sha256"),
            padding=fields.choice("padding", PADDINGS),
            sandbox=fields.choice("sandbox", SANDBOXES),
            software_version=fields.text("software_version", limits.text),
            cc_mode=fields.choice("cc_mode", CC_MODES),
            issued_at=fields.integer("issued_at"),
            keys_expire_at=fields.integer("keys_expire_at"),
        )


def _model(value: object, where: str, limits: Limits) -> ModelClaim:
    fields = strict.Fields(value, where, _MODEL)
    return ModelClaim(
        id=fields.text("id", limits.text),
        task=fields.choice("task", TASKS),
        aliases=fields.items("aliases", limits.aliases, lambda alias, at: strict.text(alias, at, limits.text)),
        weights_root=fields.digest("weights_root"),
    )


@dataclass(frozen=True)
class NonceProof:
    """Proof that one nonce is among those of a round: an inclusion proof, RFC 9162 section 2.1.3."""

    root: bytes
    index: int
    size: int
    path: tuple[bytes, ...]

    def value(self) -> dict[str, object]:
        """Its JSON value."""
        return {
            "root": strict.base64_text(self.root),
            "index": self.index,
            "size": self.size,
            "path": [strict.base64_text(node) for node in self.path],
        }

    def encode(self) -> bytes:
        """The canonical bytes."""
        return strict.encode(self.value())


@dataclass(frozen=True)
class CpuEvidence:
    """A CPU's signed report and the certificates that travel with it, leaf first, DER."""

    provider: str
    report: bytes
    certificates: tuple[bytes, ...]


@dataclass(frozen=True)
class Collateral:
    """What vendors signed about the devices, so that a client can verify offline. None of it is secret or bound to
    the nonce: each piece is judged by its own signature and dates."""

    crls: tuple[bytes, ...] = ()
    """Lists of revoked CPU certificates, DER."""
    rims: tuple[bytes, ...] = ()
    """Reference integrity manifests of the GPUs' drivers and VBIOSes, XML."""
    ocsp: tuple[bytes, ...] = ()
    """OCSP answers about the GPUs' certificates and the manifests' signers, DER."""
    tdx: bytes | None = None
    """Intel's collateral for a TDX quote, JSON."""


@dataclass(frozen=True)
class Evidence:
    """One evidence document, parsed and not yet verified."""

    claims: bytes
    """Exactly the bytes that were hashed."""
    nonces: NonceProof
    cpu: CpuEvidence
    gpu: bytes
    """Exactly the bytes of the GPU evidence bundle that were hashed."""
    collateral: Collateral = Collateral()

    def encode(self) -> bytes:
        """The document's bytes."""
        return strict.encode(
            {
                "type": "adytum-evidence",
                "version": 1,
                "claims": strict.base64_text(self.claims),
                "nonces": self.nonces.value(),
                "cpu": {
                    "provider": self.cpu.provider,
                    "report": strict.base64_text(self.cpu.report),
                    "certificates": [strict.base64_text(certificate) for certificate in self.cpu.certificates],
                },
                "gpu": strict.base64_text(self.gpu),
                "collateral": {
                    "crls": [strict.base64_text(crl) for crl in self.collateral.crls],
                    "rims": [strict.base64_text(rim) for rim in self.collateral.rims],
                    "ocsp": [strict.base64_text(answer) for answer in self.collateral.ocsp],
                    "tdx": None if self.collateral.tdx is None else strict.base64_text(self.collateral.tdx),
                },
            }
        )

    @classmethod
    def parse(cls, data: bytes, limits: Limits = LIMITS) -> Self:
        """Reads a document's outer structure; the claims stay bytes. Raises `EvidenceError`."""
        fields = strict.Fields(strict.decode(data, "the document", limits.document), "document", _DOCUMENT)
        fields.constant("type", "adytum-evidence")
        fields.constant("version", 1)
        return cls(
            claims=fields.octets("claims", limits.claims),
            nonces=_nonces(fields.raw("nonces"), limits),
            cpu=_cpu(fields.raw("cpu"), limits),
            gpu=fields.octets("gpu", limits.gpu),
            collateral=_collateral(fields.raw("collateral"), limits),
        )


def _collateral(value: object, limits: Limits) -> Collateral:
    fields = strict.Fields(value, "collateral", _COLLATERAL)

    def one(item: object, where: str) -> bytes:
        found = strict.octets(item, where, limits.collateral)
        if not found:
            raise EvidenceError(f"{where} is empty")
        return found

    return Collateral(
        crls=fields.items("crls", limits.certificates, one),
        rims=fields.items("rims", limits.rims, one),
        ocsp=fields.items("ocsp", limits.ocsp, one),
        tdx=None if fields.raw("tdx") is None else one(fields.raw("tdx"), "collateral.tdx"),
    )


def _nonces(value: object, limits: Limits) -> NonceProof:
    fields = strict.Fields(value, "nonces", _NONCES)
    return NonceProof(
        root=_hash(fields.raw("root"), "nonces.root"),
        index=fields.integer("index", limits.round - 1),
        size=fields.integer("size", limits.round),
        path=fields.items("path", limits.path, _hash),
    )


def _cpu(value: object, limits: Limits) -> CpuEvidence:
    fields = strict.Fields(value, "cpu", _CPU)
    return CpuEvidence(
        provider=fields.text("provider", limits.text),
        report=fields.octets("report", limits.report),
        certificates=fields.items(
            "certificates", limits.certificates, lambda item, where: strict.octets(item, where, limits.certificate)
        ),
    )


def _hash(value: object, where: str) -> bytes:
    decoded = strict.octets(value, where, 32)
    if len(decoded) != 32:
        raise EvidenceError(f"{where} is not 32 bytes")
    return decoded

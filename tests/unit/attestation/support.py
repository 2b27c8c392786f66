"""Evidence to test with, and a CPU that signs for real whatever a test asks of it."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from adytum.attestation.collect.rounds import Collector, CpuDevice, NoEndorsements, NoGpus
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Claims, CpuEvidence, Evidence, ModelClaim
from adytum.attestation.policy.policy import Policy
from adytum.attestation.simulated.device import SimulatedCpu
from adytum.attestation.verifier.document import VerifiedEvidence, verify

ROOT = Path(__file__).resolve().parents[3]
START = 1_795_400_000
NOW = datetime.datetime.fromtimestamp(START, datetime.UTC)
NONCES = tuple(bytes([number]) * 32 for number in range(1, 8))
NONCE = NONCES[4]

CLAIMS = Claims(
    key_configurations=bytes(range(64)),
    ehbp_key_configuration=bytes(range(41)),
    receipt_key=b"\x44" * 32,
    gateway_path="/.well-known/ohttp-gateway/alpha",
    replica="alpha",
    tls_spki_sha256=bytes(range(32)),
    models=(
        ModelClaim("demo/llama", "generate", ("latest", "llama"), b"\x11" * 32),
        ModelClaim("demo/e5", "embed", (), b"\x22" * 32),
    ),
    configuration_sha256=b"\x33" * 32,
    padding="pad",
    sandbox="full",
    software_version="0.1.0",
    cc_mode="none",
    issued_at=START,
    keys_expire_at=START + 4200,
)


def clock() -> float:
    return START


def document(
    claims: Claims = CLAIMS, cpu: CpuDevice | None = None, nonces: tuple[bytes, ...] = NONCES, nonce: bytes = NONCE
) -> bytes:
    collector = Collector(cpu or SimulatedCpu(clock=clock), NoGpus(), NoEndorsements())
    return collector.collect(claims, nonces).document(nonce)


def check(
    data: bytes,
    nonce: bytes = NONCE,
    policy: Policy | None = None,
    now: datetime.datetime = NOW,
    trust: TrustRoots | None = None,
) -> VerifiedEvidence:
    return verify(data, nonce=nonce, policy=policy or Policy.accept_simulated(), trust=trust or TrustRoots(), now=now)


def changed(data: bytes, change: Callable[[Evidence], Evidence]) -> bytes:
    return change(Evidence.parse(data)).encode()


@dataclass
class OddCpu:
    """Another implementation of the port, written from README.md. Each field is one thing it may do differently."""

    provider: str = "simulated"
    magic: bytes = b"ADYTUM SIMULATED CPU REPORT v001"
    report_data: bytes | None = None
    issued_at: int = START
    subject: str = "adytum SIMULATED CPU, proves nothing about hardware"
    curve: ec.EllipticCurve = field(default_factory=ec.SECP384R1)
    not_before: datetime.datetime = NOW - datetime.timedelta(hours=1)
    not_after: datetime.datetime = NOW + datetime.timedelta(hours=1)
    copies: int = 1
    suffix: bytes = b""
    issuer_signs: bool = True

    def report(self, report_data: bytes) -> CpuEvidence:
        key = ec.generate_private_key(self.curve)
        body = self.magic + (self.report_data or report_data) + bytes(48) + self.issued_at.to_bytes(8, "little")
        r, s = decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA384())))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.subject)])
        signer = key if self.issuer_signs else ec.generate_private_key(self.curve)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(7)
            .not_valid_before(self.not_before)
            .not_valid_after(self.not_after)
            .sign(signer, hashes.SHA384())
            .public_bytes(Encoding.DER)
        )
        report = body + r.to_bytes(48, "big") + s.to_bytes(48, "big") + self.suffix
        return CpuEvidence(self.provider, report, (certificate,) * self.copies)


def with_claims(**changes: object) -> Claims:
    return replace(CLAIMS, **changes)  # type: ignore[arg-type]

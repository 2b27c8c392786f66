"""A simulated CPU: it implements the collector's port with a key in place of hardware."""

import datetime
import hashlib
import time
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from adytum.attestation.core.errors import CollectionError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.simulated.report import ALGORITHM, BODY, MAGIC, PROVIDER, SIGNATURE_SIZE, SUBJECT

NOTHING_MEASURED = bytes(48)
_VALIDITY = datetime.timedelta(days=365)
_CLOCKS_APART = datetime.timedelta(days=1)
"""A verifier's clock may be behind by this much when the certificate is new."""


class SimulatedCpu:
    """Signs reports with a key that is made here and lives in memory only. It proves nothing about hardware."""

    provider = PROVIDER

    def __init__(self, measurement: bytes = NOTHING_MEASURED, clock: Callable[[], float] = time.time) -> None:
        if len(measurement) != 48:
            raise ValueError("a measurement has 48 bytes")
        self._measurement = measurement
        self._clock = clock
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._certificate = _self_signed(self._key, datetime.datetime.fromtimestamp(clock(), datetime.UTC))
        spki = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.key_sha256 = hashlib.sha256(spki).digest()
        """For `TrustRoots(simulated=...)`, if the verifier can learn the key beforehand."""

    def __repr__(self) -> str:
        return "SimulatedCpu()"

    def report(self, report_data: bytes) -> CpuEvidence:
        """A signed report that carries `report_data`, 64 bytes."""
        if len(report_data) != 64:
            raise CollectionError("report data has 64 bytes")
        body = BODY.pack(MAGIC, report_data, self._measurement, int(self._clock()))
        half = SIGNATURE_SIZE // 2
        signature = b"".join(
            part.to_bytes(half, "big") for part in decode_dss_signature(self._key.sign(body, ALGORITHM))
        )
        return CpuEvidence(PROVIDER, body + signature, (self._certificate,))


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SUBJECT)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + _VALIDITY)
        .sign(key, hashes.SHA384())
        .public_bytes(Encoding.DER)
    )

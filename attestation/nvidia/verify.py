"""Verifies one GPU's report with its certificates, NVIDIA's manifests and OCSP answers. Judges no matter of policy."""

import datetime
from collections.abc import Sequence
from itertools import pairwise

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from adytum.attestation.core.certificates import check_chain, load, spki_sha256
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.facts import GpuFacts
from adytum.attestation.nvidia import chain as gpu_chain
from adytum.attestation.nvidia.ocsp import check_ocsp
from adytum.attestation.nvidia.rim import Rim, compare, verify_rim
from adytum.attestation.nvidia.spdm import GpuReport

_ALGORITHM = ec.ECDSA(hashes.SHA384())
_HALF = 48


def verify_gpu(
    report: bytes,
    chain: Sequence[bytes],
    *,
    nonce: bytes,
    roots: TrustRoots,
    now: datetime.datetime,
    checks: Checks,
    rims: Sequence[bytes | Rim] = (),
    ocsp: Sequence[bytes] = (),
) -> GpuFacts:
    """Verifies at `now`, which needs a time zone. Raises `AttestationError`, or returns the facts.

    `chain`: DER, leaf first, five certificates. `rims`: manifests, as XML or parsed and not yet verified; those of
    other products are ignored.

    1. Structure: report and certificates follow their formats (`EvidenceError`).
    2. Chain: up to the pinned Device Identity CA, all valid at `now`.
    3. Signature: ECDSA P-384 with SHA-384 by the leaf over everything before it.
    4. Nonce: the request in the report carries `nonce`.
    5. Kind: a GPU, not a switch (`UnsupportedError`).
    6. Firmware: the report's FWID is the certificate's. Drivers 535 and 545 report none; this is noted as not checked.
    7. Manifests: those of this driver and this VBIOS are signed under the pinned root and valid at `now`, and the
       report has every measurement that they name. If one is missing, this is noted as not checked; the other is
       compared.
    8. Revocation: NVIDIA's OCSP answers. If one is missing, this is noted as not checked.
    """
    # 1. Structure
    parsed = GpuReport.parse(report)
    if len(chain) != gpu_chain.CHAIN_LENGTH:
        raise EvidenceError(f"a GPU's evidence has {gpu_chain.CHAIN_LENGTH} certificates, here are {len(chain)}")
    certificates = [load(der, "a GPU's certificate") for der in chain]
    checks.ok("gpu.structure", f"the report is an SPDM report with {len(parsed.measurements)} measurements")

    # 2. Chain
    check_chain(certificates, roots.nvidia_device, now, step=Step.GPU, prefix="gpu.chain")
    checks.ok("gpu.chain", "NVIDIA's root for devices issued the GPU's certificate")

    # 3. Signature
    key = certificates[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise EvidenceError("the GPU's key is not on P-384")
    r, s = (int.from_bytes(half, "big") for half in (parsed.signature[:_HALF], parsed.signature[_HALF:]))
    try:
        key.verify(encode_dss_signature(r, s), parsed.signed, _ALGORITHM)
    except InvalidSignature as error:
        raise _wrong("signature", "the report's signature is invalid for the certificate's key") from error
    checks.ok("gpu.signature", "the GPU's key signed the report")

    # 4. Nonce
    if parsed.requester_nonce != nonce:
        raise _wrong("nonce", "the GPU's report was made for another nonce")
    checks.ok("gpu.nonce", "the report was made for this nonce")

    # 5. Kind
    if parsed.is_switch:
        raise UnsupportedError(Step.GPU, "the report is an NVSwitch's, which this version cannot appraise")

    # 6. Firmware
    architecture, fwid = gpu_chain.firmware(certificates[0])
    if parsed.fwid is None:
        checks.lacks("gpu.fwid", "the driver is too old to report the GPU's firmware")
    elif parsed.fwid != fwid:
        raise _wrong("fwid", "the GPU runs another firmware than its certificate is for")
    else:
        checks.ok("gpu.fwid", f"the certificate is for the firmware that the GPU ({architecture}) runs")

    # 7. Manifests
    expires = [certificate.not_valid_after_utc for certificate in certificates]
    # NVIDIA's service answers for all but leaf and root of the device's chain, and all but the root of a manifest's.
    needed = list(pairwise(certificates[1:]))
    manifests = _manifests(parsed, architecture, rims, roots, now, checks)
    matched = 0
    if manifests:
        matched = compare(parsed.measurements, manifests, nvdec0_on=parsed.nvdec0_on)
        checks.ok("gpu.measurements", f"all {matched} measurements that NVIDIA's manifests name agree with the report")
    for rim in manifests:
        needed += pairwise(rim.chain)
        expires.append(rim.valid_until)
    rims_checked = {rim.is_vbios for rim in manifests} == {True, False}
    if not rims_checked:
        checks.lacks("gpu.rim", "NVIDIA's manifest of the driver or the VBIOS is missing")

    # 8. Revocation
    covered, until = check_ocsp(ocsp, needed, now=now, checks=checks)
    if until is not None:
        expires.append(until)
    return GpuFacts(
        architecture=architecture,
        driver=parsed.driver_version,
        vbios=parsed.vbios_version,
        fwid=fwid,
        key_sha256=spki_sha256(certificates[0]),
        protected_pcie=parsed.protected_pcie,
        rims_checked=rims_checked,
        measurements_matched=matched,
        revocation_checked=covered,
        valid_until=min(expires),
    )


def _manifests(
    report: GpuReport,
    architecture: str,
    rims: Sequence[bytes | Rim],
    roots: TrustRoots,
    now: datetime.datetime,
    checks: Checks,
) -> tuple[Rim, ...]:
    """The manifests of this driver and this VBIOS among `rims`, verified."""
    found: dict[bool, Rim] = {}
    for data in rims:
        rim = data if isinstance(data, Rim) else Rim.parse(data)
        if not rim.is_for(architecture, report.driver_version, report.vbios_version):
            continue  # Another GPU's.
        if rim.is_vbios in found:
            raise EvidenceError(f"there are two manifests of the {rim.kind} {rim.version}")
        found[rim.is_vbios] = verify_rim(rim, roots=roots.nvidia_rim, now=now, checks=checks)
    return tuple(found.values())


def _wrong(code: str, message: str) -> VerificationError:
    return VerificationError(Step.GPU, f"gpu.{code}", message)

"""`show`: describes a file, and what of it is valid, for people. It uses no policy and no nonce."""

import datetime
import json
import tomllib
from collections.abc import Callable
from typing import TextIO

from cryptography import x509

from adytum.attestation.cli import commands
from adytum.attestation.cli.verdict import ACCEPTED, MALFORMED, REJECTED, RESULTS, UNSUPPORTED
from adytum.attestation.core.certificates import load_all, spki_sha256
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import AttestationError, EvidenceError, PolicyFileError, UnsupportedError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.document.evidence import Claims, Evidence
from adytum.attestation.policy.policy import Policy
from adytum.attestation.snp import report as snp_report
from adytum.attestation.snp.report import SnpReport, tcb_levels
from adytum.attestation.verifier.document import establish

_GREEN, _RED, _YELLOW, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[0m"


def show(data: bytes, now: datetime.datetime, *, colour: bool, out: TextIO | None = None) -> int:
    """Prints the description. Returns 0 if all that can be checked is valid, else the status of the error."""
    printer = _Printer(colour, out)
    kind, shower = _kind(data)
    try:
        if shower is None:
            raise EvidenceError("its kind is unknown")
        printer.title(kind)
        return shower(data, now, printer)
    except EvidenceError as error:
        printer.cross(f"{error}")
        return MALFORMED
    except UnsupportedError as error:
        printer.cross(f"{error}")
        return UNSUPPORTED
    except AttestationError as error:
        printer.cross(f"{error}")
        return REJECTED


class _Printer:
    """Lines with a mark. Text from a file is printed as ASCII, because it must not control a terminal."""

    def __init__(self, colour: bool, out: TextIO | None) -> None:
        self._colour = colour
        self._out = out

    def title(self, text: str) -> None:
        self._print(text)

    def line(self, name: str, value: object) -> None:
        self._print(f"    {name:<22} {_ascii(str(value))}")

    def tick(self, text: str) -> None:
        self._mark("✓", _GREEN, text)

    def cross(self, text: str) -> None:
        self._mark("✗", _RED, text)

    def open(self, text: str) -> None:
        self._mark("·", _YELLOW, text)

    def checks(self, checks: Checks) -> None:
        for check in checks.passed:
            self.tick(check.says)
        for check in checks.not_given:
            self.open(f"not checked: {check.says}")

    def _mark(self, mark: str, colour: str, text: str) -> None:
        text = _ascii(text)
        self._print(f"  {colour}{mark}{_PLAIN} {text}" if self._colour else f"  {mark} {text}")

    def _print(self, text: str) -> None:
        print(text, file=self._out)


_Shower = Callable[[bytes, datetime.datetime, _Printer], int]


def _kind(data: bytes) -> tuple[str, _Shower | None]:
    start = data.lstrip()[:64]
    if len(data) == snp_report.SIZE and data[:1] in b"\x02\x03\x04\x05":
        return "An SEV-SNP attestation report", _snp
    if data.startswith(b"HCLA"):
        return "A paravisor's report, with an SEV-SNP report in it", _hcl
    if data.startswith(b"\x11\xe0"):
        return "An NVIDIA GPU's report (SPDM measurements)", _gpu
    if data[:2] in (b"\x04\x00", b"\x05\x00") and data[4:8] == b"\x81\x00\x00\x00":
        return "A TDX quote", _tdx
    if b"-----BEGIN CERTIFICATE-----" in data:
        return "Certificates", _certificates
    if b"-----BEGIN X509 CRL-----" in data:
        return "A list of revoked certificates", _crl
    if start.startswith(b"<"):
        return "A reference integrity manifest", _rim
    if start.startswith(b"{") and b'"adytum-evidence"' in data:
        return "An evidence document", _document
    if start.startswith(b"{") and b'"not_checked"' in data:
        return "The verdict of an earlier command", _verdict
    if start.startswith(b"\x30"):
        return "Certificates", _certificates
    try:
        tomllib.loads(data.decode())
    except (ValueError, RecursionError):
        return "A file", None
    return "An appraisal policy", _policy


def _document(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    evidence = Evidence.parse(data)
    claims = Claims.parse(evidence.claims)
    printer.line("replica", claims.replica)
    printer.line("CPU evidence", f"{evidence.cpu.provider}, {len(evidence.cpu.report)} bytes")
    printer.line("GPU evidence", "none" if evidence.gpu == b"[]" else f"{len(evidence.gpu)} bytes")
    printer.line("issued, keys expire", f"{_date(claims.issued_at)}, {_date(claims.keys_expire_at)}")
    for model in claims.models:
        also = f" (also {', '.join(model.aliases)})" if model.aliases else ""
        printer.line("model", f"{model.id}{also}, {model.task}, weights {model.weights_root.hex()}")
    printer.line("configuration", claims.configuration_sha256.hex())
    printer.line("TLS key", "none" if claims.tls_spki_sha256 is None else claims.tls_spki_sha256.hex())
    printer.line("key of receipts", claims.receipt_key.hex())
    printer.line("padding, sandbox", f"{claims.padding}, {claims.sandbox}")
    printer.line("software", claims.software_version)
    printer.line("GPUs' CC mode", claims.cc_mode)
    printer.tick("the document follows its format")
    printer.open(
        f"not checked: whether it was made for you. It is number {evidence.nonces.index} of the "
        f"{evidence.nonces.size} that share one report; `verify --nonce` checks yours"
    )
    checks = Checks()
    try:
        establish(evidence, claims, trust=TrustRoots(), now=now, checks=checks)
    finally:
        printer.checks(checks)
    printer.open("not checked: whether you accept all this; `verify --policy` judges")
    return ACCEPTED


def _snp(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    report = SnpReport.parse(data)
    product = report.product
    printer.line("version, processor", f"{report.version}, {product or 'known from the certificate only'}")
    printer.line("measurement", report.measurement.hex())
    printer.line("report data", report.report_data.hex())
    printer.line("VMPL, signed with", f"{report.vmpl}, {report.signing_key}")
    printer.line("guest policy", f"debug {_on(report.debug)}, migration {_on(report.migration)}")
    printer.line("platform", ", ".join(sorted(report.flags)))
    levels = tcb_levels(product, report.reported_tcb) if product else {}
    printer.line("reported firmware", ", ".join(f"{k} {v}" for k, v in levels.items()) or report.reported_tcb.hex())
    printer.line("chip", report.chip_id.hex())
    printer.tick("the report follows its format")
    if report.debug:
        printer.cross("debugging is on: the host can read all of the guest")
    printer.open("not checked: the signature, which needs certificates; `snp --vek --chain` checks it")
    return REJECTED if report.debug else ACCEPTED


def _hcl(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    from adytum.attestation.vtpm.hcl import HclReport

    hcl = HclReport.parse(data)
    printer.line("user data", "none" if hcl.user_data is None else hcl.user_data.hex())
    return _snp(hcl.snp_report, now, printer)


def _gpu(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    from adytum.attestation.nvidia.spdm import GpuReport

    report = GpuReport.parse(data)
    printer.line("asked with nonce", report.requester_nonce.hex())
    printer.line("driver, VBIOS", f"{report.driver_version}, {report.vbios_version}")
    printer.line("measurements", len(report.measurements))
    printer.tick("the report follows its format")
    printer.open("not checked: the signature, which needs certificates; `gpu --chain --nonce` checks it")
    return ACCEPTED


def _tdx(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    from adytum.attestation.tdx.quote import TdxQuote

    quote = TdxQuote.parse(data)
    printer.line("version", quote.version)
    printer.line("measurement", quote.td.measurement.hex())
    printer.line("report data", quote.td.report_data.hex())
    printer.line("debug, migratable", f"{_on(quote.td.debug)}, {_on(quote.td.migratable)}")
    verdict = commands.tdx(data, None, None, now)
    printer.checks(verdict.checks)
    if verdict.status != ACCEPTED:
        printer.cross(verdict.reason)
    return verdict.status


def _rim(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    from adytum.attestation.nvidia.rim import verify_rim

    checks = Checks()
    try:
        rim = verify_rim(data, roots=TrustRoots().nvidia_rim, now=now, checks=checks)
    finally:
        printer.checks(checks)
    printer.line("for", f"{rim.product}, {rim.kind} {rim.version}")
    printer.line("measurements", len(rim.measurements))
    return ACCEPTED


def _certificates(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    status = ACCEPTED
    for certificate in load_all(data, "the file"):
        printer.line("subject", certificate.subject.rfc4514_string())
        printer.line("issuer", certificate.issuer.rfc4514_string())
        printer.line("SHA-256 of its key", spki_sha256(certificate).hex())
        until = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        if certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            printer.tick(f"valid from {until}")
        else:
            printer.cross(f"valid from {until}, not on {now:%Y-%m-%d}")
            status = REJECTED
    return status


def _crl(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    try:
        crl = x509.load_pem_x509_crl(data)
        revoked = [f"{entry.serial_number:x}" for entry in crl]
        until = crl.next_update_utc
    except Exception as error:  # The library's errors for odd lists have no common base.
        raise EvidenceError("the list of revoked certificates cannot be read") from error
    printer.line("issuer", crl.issuer.rfc4514_string())
    printer.line("revoked serial numbers", ", ".join(revoked) or "none")
    current = until is not None and crl.last_update_utc <= now <= until
    (printer.tick if current else printer.cross)(f"{'current' if current else 'not current'}: until {until}")
    return ACCEPTED if current else REJECTED


def _policy(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    try:
        policy = Policy.from_toml(data)
    except PolicyFileError as error:
        printer.cross(str(error))
        return MALFORMED
    for line in policy.to_toml().splitlines():
        if line and not line.startswith("#"):
            printer.line(*line.partition(" = ")[::2])
    printer.tick("every claim is decided")
    return ACCEPTED


def _verdict(data: bytes, now: datetime.datetime, printer: _Printer) -> int:
    try:
        found = json.loads(data)
        status = {result: status for status, result in RESULTS.items()}[found["result"]]
        for check in found["checks"]:
            printer.tick(check["says"])
        for check in found["not_checked"]:
            printer.open(f"not checked: {check['says']}")
        if status != ACCEPTED:
            printer.cross(f"{found['result']} ({found['code']}): {found['reason']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvidenceError("the verdict cannot be read") from error
    return status


def _on(value: bool) -> str:
    return "on" if value else "off"


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode() if text.isprintable() else ascii(text)


def _date(seconds: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970, beyond the calendar"

"""The launch measurement of an SEV-SNP guest, from what QEMU loads into it. Only this file uses sev-snp-measure.

QEMU's `kernel-hashes=on` puts the hashes of kernel, initial RAM disk and command line into a page of the firmware,
which is measured; so the measurement covers all three, the firmware and each virtual CPU's initial state.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adytum.attestation.core.errors import AttestationError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.reference.measurements import Input, Measurements

SNP_ACTIVE = 0x1
"""SEV_FEATURES that QEMU 9.1 and later request; AMD's older trees leave it to the kernel, which may set 0x21."""
DEFAULT_POLICY = 0x30000
"""SMT allowed (bit 16) and bit 17, which is always one; no debugging, no migration."""
_DEBUG, _MIGRATE, _ALWAYS_ONE = 1 << 19, 1 << 18, 1 << 17
_CMDLINE = 2047
"""Characters; the kernel's COMMAND_LINE_SIZE on x86 without the final NUL."""
_PAGE = 4096


class MeasureError(AttestationError):
    """The inputs cannot be measured. The message says what to do."""


@dataclass(frozen=True)
class Launch:
    """What is loaded. `cmdline` is the exact text after QEMU's -append."""

    firmware: Path
    kernel: Path
    initrd: Path | None
    cmdline: str
    vcpu_type: str
    guest_features: int = SNP_ACTIVE
    guest_policy: int = DEFAULT_POLICY


def measure(launch: Launch, vcpus: Iterable[int], *, firmware_digest: bytes | None = None) -> Measurements:
    """The measurement for each number of virtual CPUs. Raises `MeasureError`.

    `firmware_digest` is the launch digest over the firmware's pages alone, 48 bytes (`sev-snp-measure --mode
    snp:ovmf-hash`). With it only the tables at the firmware's end are read, so the file's last 4 KiB are enough.
    """
    guest, sev_mode, signatures = _library()
    counts = sorted(set(vcpus))
    if not counts or not all(1 <= count <= LIMITS.vcpus for count in counts):
        raise MeasureError(f"give at least one number of virtual CPUs from 1 to {LIMITS.vcpus}")
    if launch.vcpu_type not in signatures:
        raise MeasureError(f"the CPU type {launch.vcpu_type!r} is unknown; choose from {', '.join(sorted(signatures))}")
    _check(launch)
    firmware, kernel = _input(launch.firmware, "firmware"), _input(launch.kernel, "kernel")
    initrd = None if launch.initrd is None else _input(launch.initrd, "initial RAM disk")
    if firmware.size == 0 or firmware.size % _PAGE:
        raise MeasureError(f"the firmware {launch.firmware} is not whole pages of {_PAGE} bytes; give the .fd file")
    try:
        found = {
            count: guest.calc_launch_digest(
                sev_mode.SEV_SNP,
                count,
                signatures[launch.vcpu_type],
                str(launch.firmware),
                str(launch.kernel),
                "" if launch.initrd is None else str(launch.initrd),
                launch.cmdline,
                launch.guest_features,
                "" if firmware_digest is None else firmware_digest.hex(),
            )
            for count in counts
        }
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise MeasureError(
            f"the firmware {launch.firmware} cannot carry measured kernels ({error}): build OVMF from "
            "OvmfPkg/AmdSev/AmdSevX64.dsc, as docs/how-to/measurement.md says"
        ) from error
    return Measurements(
        tool=f"sev-snp-measure {importlib.metadata.version('sev-snp-measure')}",
        firmware=firmware,
        kernel=kernel,
        initrd=initrd,
        cmdline=launch.cmdline,
        vcpu_type=launch.vcpu_type,
        guest_features=launch.guest_features,
        guest_policy=launch.guest_policy,
        by_vcpus=found,
    )


def _library() -> tuple[Any, Any, dict[str, int]]:
    try:
        from sevsnpmeasure import guest, vcpu_types  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from sevsnpmeasure.sev_mode import SevMode  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MeasureError("sev-snp-measure is not installed; run: pip install 'adytum[measure]'") from error
    return guest, SevMode, vcpu_types.CPU_SIGS


def _check(launch: Launch) -> None:
    policy, cmdline = launch.guest_policy, launch.cmdline
    if policy & (_DEBUG | _MIGRATE):
        raise MeasureError(
            f"the guest policy {policy:#x} lets the host read or move the guest's memory; no client's policy takes "
            f"that. Use {DEFAULT_POLICY:#x}"
        )
    if not policy & _ALWAYS_ONE or policy >> 26:
        raise MeasureError(
            f"the guest policy {policy:#x} is invalid for SNP: bit 17 has to be one, bits 26 and up zero"
        )
    if not launch.guest_features & SNP_ACTIVE or launch.guest_features >> 64:
        raise MeasureError(f"the guest features {launch.guest_features:#x} lack SEV-SNP (bit 0); use {SNP_ACTIVE:#x}")
    if len(cmdline) > _CMDLINE or not cmdline.isascii() or (cmdline and not cmdline.isprintable()):
        raise MeasureError(f"the command line is not one line of at most {_CMDLINE} printable ASCII characters")


def _input(path: Path, what: str) -> Input:
    try:
        with path.open("rb") as file:
            return Input(path.stat().st_size, hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise MeasureError(f"the {what} {path} cannot be read: {error.strerror}") from error

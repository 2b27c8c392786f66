"""The file of launch measurements, `measurements.json`, which a build computes and a policy reads.

JSON (RFC 8259) that people read too, so white space is free. Its fields are exactly these:

    {"type": "adytum-measurements", "version": 1, "tool": "sev-snp-measure 0.0.13",
     "firmware": {"bytes": 4194304, "sha256": hex}, "kernel": {...}, "initrd": {...} or null,
     "cmdline": "root=/dev/vda ...", "vcpu_type": "EPYC-v4", "guest_features": 1, "guest_policy": 196608,
     "measurements": [{"vcpus": 8, "measurement": 96 hex digits}, ...]}

Anybody with the files that the hashes name can compute each measurement again.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from adytum.attestation.core import strict
from adytum.attestation.core.errors import EvidenceError, PolicyFileError
from adytum.attestation.core.limits import LIMITS

SIZE = 48
"""Bytes of a launch measurement (SHA-384)."""
_MEASUREMENT = re.compile("[0-9a-f]{96}")
_FIELDS = frozenset(
    {
        "type",
        "version",
        "tool",
        "firmware",
        "kernel",
        "initrd",
        "cmdline",
        "vcpu_type",
        "guest_features",
        "guest_policy",
        "measurements",
    }
)


@dataclass(frozen=True)
class Input:
    """One measured file."""

    size: int
    """Bytes."""
    sha256: bytes

    @classmethod
    def parse(cls, value: object, where: str) -> Self:
        """Reads its JSON value. Raises `EvidenceError`."""
        fields = strict.Fields(value, where, frozenset({"bytes", "sha256"}))
        return cls(fields.integer("bytes"), fields.digest("sha256"))

    def value(self) -> dict[str, object]:
        """Its JSON value."""
        return {"bytes": self.size, "sha256": self.sha256.hex()}


@dataclass(frozen=True)
class Measurements:
    """The measurements of one set of inputs, by number of virtual CPUs."""

    tool: str
    firmware: Input
    kernel: Input
    initrd: Input | None
    cmdline: str
    vcpu_type: str
    guest_features: int
    """SEV_FEATURES of the initial state, by bit: AMD's manual, volume 2, table B-4."""
    guest_policy: int
    """The SNP policy that the host has to launch with. Not in the measurement: the report carries it."""
    by_vcpus: dict[int, bytes]
    """Number of virtual CPUs to launch measurement, 48 bytes."""

    @property
    def accepted(self) -> frozenset[bytes]:
        """All measurements, for a policy."""
        return frozenset(self.by_vcpus.values())

    def encode(self) -> bytes:
        """The file's bytes."""
        value = {
            "type": "adytum-measurements",
            "version": 1,
            "tool": self.tool,
            "firmware": self.firmware.value(),
            "kernel": self.kernel.value(),
            "initrd": None if self.initrd is None else self.initrd.value(),
            "cmdline": self.cmdline,
            "vcpu_type": self.vcpu_type,
            "guest_features": self.guest_features,
            "guest_policy": self.guest_policy,
            "measurements": [
                {"vcpus": vcpus, "measurement": found.hex()} for vcpus, found in sorted(self.by_vcpus.items())
            ],
        }
        return json.dumps(value, indent=2).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads the file's bytes. Raises `EvidenceError`."""
        what = "measurements"
        fields = strict.Fields(strict.read(data, what, LIMITS.policy), what, _FIELDS)
        fields.constant("type", "adytum-measurements")
        fields.constant("version", 1)
        cmdline = fields.raw("cmdline")
        if not isinstance(cmdline, str) or not cmdline.isascii() or not (cmdline == "" or cmdline.isprintable()):
            raise EvidenceError("measurements.cmdline is not a line of printable ASCII")
        entries = fields.items("measurements", LIMITS.release_measurements, _entry)
        by_vcpus = dict(entries)
        if not by_vcpus or len(by_vcpus) != len(entries):
            raise EvidenceError("measurements.measurements is empty, or has one number of virtual CPUs twice")
        return cls(
            tool=_words(fields.raw("tool"), "measurements.tool"),
            firmware=Input.parse(fields.raw("firmware"), "measurements.firmware"),
            kernel=Input.parse(fields.raw("kernel"), "measurements.kernel"),
            initrd=None if fields.raw("initrd") is None else Input.parse(fields.raw("initrd"), "measurements.initrd"),
            cmdline=cmdline,
            vcpu_type=fields.text("vcpu_type", LIMITS.text),
            guest_features=fields.integer("guest_features"),
            guest_policy=fields.integer("guest_policy"),
            by_vcpus=by_vcpus,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file. Raises `PolicyFileError`."""
        try:
            with path.open("rb") as file:
                return cls.parse(file.read(LIMITS.policy + 1))
        except (OSError, ValueError) as error:
            raise PolicyFileError(f"the measurements {path} cannot be read: {error}") from error
        except EvidenceError as error:
            raise PolicyFileError(f"the measurements {path} cannot be used: {error}") from error


def digest(value: object, where: str) -> bytes:
    """A launch measurement in lower-case hexadecimal. Raises `EvidenceError`."""
    if not isinstance(value, str) or not _MEASUREMENT.fullmatch(value):
        raise EvidenceError(f"{where} is not 96 lower-case hexadecimal digits")
    return bytes.fromhex(value)


def _entry(value: object, where: str) -> tuple[int, bytes]:
    fields = strict.Fields(value, where, frozenset({"vcpus", "measurement"}))
    vcpus = fields.integer("vcpus", LIMITS.vcpus)
    if vcpus == 0:
        raise EvidenceError(f"{where}.vcpus is 0")
    return vcpus, digest(fields.raw("measurement"), f"{where}.measurement")


def _words(value: object, where: str) -> str:
    """Visible ASCII and single spaces."""
    if not isinstance(value, str):
        raise EvidenceError(f"{where} is not a string")
    return " ".join(strict.text(word, where, LIMITS.text) for word in value.split(" "))

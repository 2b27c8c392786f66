"""The SEV-SNP device through a fake configfs-tsm and a fake /dev/sev-guest, and the host's certificate table."""

import datetime
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import CollectionError, EvidenceError
from adytum.attestation.core.limits import LIMITS
from adytum.attestation.core.trust import AMD_ARK
from adytum.attestation.snp.device import SevSnp
from adytum.attestation.snp.report import SnpReport
from adytum.attestation.snp.table import certificates
from adytum.attestation.snp.verify import verify_snp
from adytum.attestation.tsm.device import Tsm
from tests.unit.attestation.snp.authority import DAY, LEVELS, NOW, Processor
from tests.unit.attestation.snp.guest import GET_EXT_REPORT, GET_REPORT, FakeGuest, table
from tests.unit.attestation.tsm.configfs import configfs

GENOA = Processor()
DATA = bytes(range(64))
VEK, ASK, ARK = GENOA.certificates
FULL = table({"ark": ARK, "ask": ASK, "vcek": VEK})


def none(report: SnpReport) -> tuple[bytes, ...]:
    raise CollectionError("not there yet")


def no_chain(product: str, kind: str) -> tuple[bytes, ...]:
    raise CollectionError("no chain yet")


def given_chain(report: SnpReport) -> tuple[bytes, ...]:
    assert report.report_data == DATA
    return GENOA.certificates


@pytest.fixture
def guest(tmp_path: Path) -> Callable[..., SevSnp]:
    """A machine without configfs-tsm."""
    device = tmp_path / "sev-guest"
    device.write_bytes(b"")

    def make(fake: FakeGuest, vendor: Any = none, waited: list[float] | None = None, chain: Any = no_chain) -> SevSnp:
        sleep = (waited if waited is not None else []).append
        return SevSnp(vendor, chain, Tsm(tmp_path / "absent"), device, fake, sleep)

    return make


def check(evidence: Any) -> None:
    found = verify_snp(evidence.report, evidence.certificates, ark=GENOA.pins, now=NOW, checks=Checks())
    assert found.report_data == DATA


def genoa(inblob: bytes, level: int) -> bytes:
    return GENOA.report(inblob, vmpl=level)


@pytest.mark.parametrize("auxblob", [b"", None])
def test_through_configfs_with_the_vendors_certificates(auxblob: bytes | None, tmp_path: Path) -> None:
    device = SevSnp(given_chain, no_chain, Tsm(configfs(tmp_path, genoa, auxblob=auxblob)), tmp_path / "absent")
    check(device.report(DATA))
    assert list(tmp_path.iterdir()) == []


def test_through_configfs_with_the_hosts_certificates(tmp_path: Path) -> None:
    check(SevSnp(none, no_chain, Tsm(configfs(tmp_path, genoa, auxblob=FULL)), tmp_path / "absent").report(DATA))


def test_through_configfs_below_a_service_module(tmp_path: Path) -> None:
    tsm = Tsm(configfs(tmp_path, genoa, auxblob=FULL, floor="2"))
    evidence = SevSnp(none, no_chain, tsm, tmp_path / "absent").report(DATA)
    check(evidence)
    assert SnpReport.parse(evidence.report).vmpl == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda inblob, level: genoa(b"o" * 64, level), "other report data"),
        (lambda inblob, level: genoa(inblob, level)[:-1], "1184 bytes, this one has 1183"),
        (lambda inblob, level: b"no report", "no usable evidence"),
    ],
)
def test_reports_that_cannot_be_used(make: Any, words: str, tmp_path: Path) -> None:
    device = SevSnp(none, no_chain, Tsm(configfs(tmp_path, make, auxblob=FULL)), tmp_path / "absent")
    with pytest.raises(CollectionError, match=words):
        device.report(DATA)
    assert list(tmp_path.iterdir()) == []


def test_a_real_guests_answers_through_configfs(vectors: Path, tmp_path: Path) -> None:
    """What one kernel gave, byte for byte: report and certificates hold at AMD's pinned root, and nobody is asked."""
    folder = vectors / "sev-snp" / "genoa-v3-tsm-auxblob"
    about = json.loads((folder / "case.json").read_text())
    outblob, auxblob = ((folder / f"{name}.bin").read_bytes() for name in ("outblob", "auxblob"))
    tsm = Tsm(configfs(tmp_path, lambda inblob, level: outblob, auxblob=auxblob))
    evidence = SevSnp(none, no_chain, tsm, tmp_path / "absent").report(bytes.fromhex(about["report_data"]))
    now = datetime.datetime.fromisoformat(about["vek_validity"][0]) + DAY
    found = verify_snp(evidence.report, evidence.certificates, ark=AMD_ARK, now=now, checks=Checks())
    assert found.measurement.hex() == about["measurement"]


def test_through_configfs_on_another_platform(tmp_path: Path) -> None:
    tsm = Tsm(configfs(tmp_path, genoa, provider="tdx_guest"))
    device = SevSnp(given_chain, no_chain, tsm, tmp_path / "absent")
    with pytest.raises(CollectionError, match="tdx_guest"):
        device.report(DATA)


def test_a_machine_with_neither(tmp_path: Path) -> None:
    device = SevSnp(given_chain, no_chain, Tsm(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(CollectionError, match="neither configfs-tsm nor"):
        device.report(DATA)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size(size: int, guest: Callable[..., SevSnp]) -> None:
    with pytest.raises(CollectionError, match="64 bytes"):
        guest(FakeGuest(GENOA)).report(bytes(size))


def test_through_the_device_with_the_hosts_certificates(guest: Callable[..., SevSnp]) -> None:
    """The table is larger than the first buffer: the host says how large, and is asked again."""
    large = table({"ark": ARK, "ask": ASK, "vcek": VEK, "00" * 15 + "01": bytes(5000)})
    for given_table, times in ((FULL, 1), (large, 2)):
        fake = FakeGuest(GENOA, given_table)
        check(guest(fake).report(DATA))
        assert len(fake.asked) == times


@pytest.mark.parametrize("incomplete", [b"", table({"vlek": VEK}), table({"ask": ASK, "ark": ARK}), bytes(24)])
def test_the_vendor_is_asked_where_the_host_gave_less(incomplete: bytes, guest: Callable[..., SevSnp]) -> None:
    check(guest(FakeGuest(GENOA, incomplete), given_chain).report(DATA))
    with pytest.raises(CollectionError, match="not there yet"):
        guest(FakeGuest(GENOA, incomplete)).report(DATA)


@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("more", [{}, {"ark": ARK}])
def test_the_rest_of_the_chain_where_the_host_gave_the_key_alone(
    kind: str, more: dict[str, bytes], guest: Callable[..., SevSnp]
) -> None:
    """As providers do with their VLEK, which AMD's service does not have."""
    milan = Processor("Milan", kind)
    fake = FakeGuest(milan, table({kind: milan.certificates[0], **more}))

    def chain(product: str, asked: str) -> tuple[bytes, ...]:
        assert (product, asked) == ("Milan", kind)
        return milan.certificates[1:]

    assert guest(fake, chain=chain).report(DATA).certificates == milan.certificates
    with pytest.raises(CollectionError, match="no chain yet"):
        guest(fake, given_chain).report(DATA)


@pytest.mark.parametrize(
    "stale",
    [Processor(levels=LEVELS | {"snp": 22}), Processor("Milan"), Processor(kind="vlek")],
    ids=["firmware", "product", "kind"],
)
def test_the_vendor_is_asked_where_the_hosts_certificate_does_not_fit(
    stale: Processor, guest: Callable[..., SevSnp]
) -> None:
    given = table(dict(zip(("vcek", "ask", "ark"), stale.certificates, strict=True)))
    check(guest(FakeGuest(GENOA, given), given_chain).report(DATA))


def test_a_host_with_more_certificates_than_the_kernel_passes_on(guest: Callable[..., SevSnp]) -> None:
    fake = FakeGuest(GENOA, FULL + bytes(4 * 4096))
    check(guest(fake, given_chain).report(DATA))
    assert fake.asked == [GET_EXT_REPORT, GET_REPORT]


def test_a_busy_host_is_asked_again_later(guest: Callable[..., SevSnp]) -> None:
    waited: list[float] = []
    fake = FakeGuest(GENOA, FULL, busy=3)
    check(guest(fake, none, waited).report(DATA))
    assert (len(fake.asked), waited) == (4, [0.25, 0.5, 1.0])
    with pytest.raises(CollectionError, match="busy"):
        guest(FakeGuest(GENOA, FULL, busy=100)).report(DATA)


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeGuest(GENOA, FULL, firmware_error=0x05), "firmware error 0x5, host error 0x0"),
        (FakeGuest(GENOA, FULL, firmware_error=0x27), "firmware error 0x27 .*restart the machine"),
        (FakeGuest(GENOA, FULL, firmware_error=0xFF), "firmware error 0xff .*was not asked"),
        (FakeGuest(GENOA, FULL, host_error=7), "host error 0x7"),
        (FakeGuest(GENOA, FULL, kernel_error=errno.EIO), "Input/output error; firmware error 0x0"),
        (FakeGuest(GENOA, FULL, kernel_error=errno.ENOTTY), "restarted"),
        (FakeGuest(GENOA, FULL, status=0x16), "status 0x16 .*configfs-tsm"),
        (FakeGuest(GENOA, FULL, always_too_small=True), "requested without"),
        (FakeGuest(GENOA, b"\1" * 50), "no usable evidence"),
    ],
)
def test_failures_say_what_failed(fake: FakeGuest, words: str, guest: Callable[..., SevSnp]) -> None:
    with pytest.raises(CollectionError, match=words):
        guest(fake).report(DATA)


def test_a_device_that_may_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "sev-guest").mkdir()
    with pytest.raises(CollectionError, match="cannot be opened"):
        SevSnp(none, no_chain, Tsm(tmp_path / "absent"), tmp_path / "sev-guest").report(DATA)


def test_the_hosts_real_table(vectors: Path) -> None:
    folder = vectors / "sev-snp" / "genoa-v3-tsm-auxblob"
    chain = certificates((folder / "auxblob.bin").read_bytes(), "vcek")
    assert chain[0] == (folder / "vcek.der").read_bytes()
    roots = [
        x509.load_pem_x509_certificate((folder.parent / "amd-roots" / f"genoa_{n}.pem").read_bytes())
        for n in ("ask", "ark")
    ]
    assert chain[1:] == tuple(root.public_bytes(Encoding.DER) for root in roots)
    assert certificates((folder / "auxblob.bin").read_bytes(), "vlek") == ()


@pytest.mark.parametrize("pem", [False, True])
def test_tables_in_both_forms(pem: bool) -> None:
    entries = {"vlek": VEK, "ask": ASK, "ark": ARK}
    if pem:
        entries = {
            name: x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for name, der in entries.items()
        }
    assert certificates(table(entries), "vlek") == GENOA.certificates
    assert certificates(table(entries) + bytes(100), "vlek") == GENOA.certificates


@pytest.mark.parametrize(
    "data",
    [
        FULL[:24],
        FULL[:-1],
        # The last certificate is whole, and said to have a byte more than there is.
        FULL[:68] + (len(VEK) + 1).to_bytes(4, "little") + FULL[72:],
        FULL[:71],
        table({"vcek": VEK, "ask": ASK, "ark": b""}),
        table({"vcek": VEK, "ask": ASK, "ark": b"no certificate"}),
        table({"vcek": VEK, "63da758de6644564adc5f4b93be8accd": VEK, "ask": ASK, "ark": ARK}),
        table({f"{number:032x}": b"x" for number in range(1, 10)}),
        bytes(16) + b"\1" + bytes(7),
        bytes(LIMITS.auxblob + 1),
    ],
)
def test_tables_that_cannot_be_read(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        certificates(data, "vcek")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_only_our_error_escapes_the_table(inserted: bytes, at: int) -> None:
    for data in (inserted, FULL[:at] + inserted + FULL[at + len(inserted) :]):
        try:
            certificates(data, "vcek")
        except EvidenceError:
            continue

"""The vendors' cache: what is asked of whom, what is kept and for how long, whatever is sent. Over real HTTP."""

import base64
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.collect.vendors import AMD_KDS, FetchFailed, Request, VendorCache, https
from adytum.attestation.core.certificates import load, load_all
from adytum.attestation.core.checks import Checks
from adytum.attestation.core.errors import CollectionError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.nvidia.ocsp import check_ocsp, ocsp_request
from adytum.attestation.snp.report import SnpReport
from adytum.attestation.snp.vek import Vek
from adytum.attestation.snp.verify import verify_snp
from tests.unit.attestation.collect.vendor_case import (
    CHIP,
    DAY,
    GETTERS,
    HOUR,
    MINUTE,
    Case,
    Clock,
    missing,
    ocsp_der,
    report,
)
from tests.unit.attestation.vendors import FAILURES, START, Server, Vendors, ark, ask, issue, ocsp_pair, serving


@pytest.fixture
def case() -> Iterator[Case]:
    with serving() as (vendors, server):
        yield Case(vendors, server)


# What is asked of whom


@pytest.mark.parametrize(
    ("product", "target"),
    [
        ("Milan", f"/vcek/v1/Milan/{CHIP.hex()}?blSPL=01&teeSPL=02&snpSPL=07&ucodeSPL=08"),
        ("Genoa", f"/vcek/v1/Genoa/{CHIP.hex()}?blSPL=01&teeSPL=02&snpSPL=07&ucodeSPL=08"),
        ("Turin", "/vcek/v1/Turin/0102030405060708?fmcSPL=01&blSPL=02&teeSPL=03&snpSPL=04&ucodeSPL=08"),
    ],
)
def test_amd_is_asked_for_chip_and_firmware_and_one_refresh_gets_all(case: Case, product: str, target: str) -> None:
    get = lambda: case.cache.amd_certificates(report(product))  # noqa: E731
    missing(get)
    assert case.paths == []
    case.cache.refresh()
    found = get()
    assert sorted(case.paths) == sorted([target, f"/vcek/v1/{product}/cert_chain"])
    assert found[1:] == (ask(product, "vcek").der, ark(product).der)
    load(found[0], "VCEK").verify_directly_issued_by(ask(product, "vcek").certificate)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (report("Milan", key=1), "vlek"),
        (report("Milan", key=7), "none"),
        (report("Milan", version=2), "version 2"),
        (report("Genoa", chip=bytes(64)), "MASK_CHIP_ID"),
    ],
)
def test_what_amd_does_not_have_is_not_asked_for(case: Case, asked: SnpReport, said: str) -> None:
    assert said in missing(lambda: case.cache.amd_certificates(asked))
    case.cache.refresh()
    assert case.paths == []


@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_the_chain_of_either_kind_of_key(case: Case, kind: str) -> None:
    get = lambda: case.cache.amd_chain("Milan", kind)  # type: ignore[arg-type]  # noqa: E731
    missing(get)
    case.cache.refresh()
    assert get() == (ask("Milan", kind).der, ark("Milan").der)


def test_azure_is_asked_with_its_header(case: Case) -> None:
    assert _status(case.server, "/metadata/THIM/amd/certification") == 400
    missing(case.cache.azure_certificates)
    case.cache.refresh()
    found = case.cache.azure_certificates()
    assert found[1:] == (ask("Genoa", "vcek").der, ark("Genoa").der)


def _status(server: Server, path: str) -> int:
    try:
        https(Request(server.url + path))
    except FetchFailed as error:
        return int(str(error).split()[-1])
    return 200


def test_an_ocsp_answer_holds_for_the_certificate_that_was_asked_about(case: Case) -> None:
    missing(lambda: case.cache.ocsp(ocsp_der()))
    case.cache.refresh()
    leaf, issuer = ocsp_pair()
    answers, needed = [case.cache.ocsp(ocsp_der())], [(leaf.certificate, issuer.certificate)]
    assert check_ocsp(answers, needed, now=START, checks=Checks())[0]


def test_ocsp_answers_about_others_and_refusals_are_not_kept(case: Case) -> None:
    _, issuer = ocsp_pair()
    other = issue("another GPU", issuer, ca=False)
    asked = ocsp_request(other.certificate, issuer.certificate)
    missing(lambda: case.cache.ocsp(asked))
    case.cache.refresh()  # Unauthorized: the service does not know it.
    assert "not an OCSP answer" in missing(lambda: case.cache.ocsp(asked))
    leaf, _ = ocsp_pair()
    case.vendors.recorded["/"] = case.vendors.ocsp_answer(leaf, issuer)
    case.wait(MINUTE)
    assert "about another certificate" in missing(lambda: case.cache.ocsp(asked))


def test_real_reports_verify_with_what_amd_is_asked_for(case: Case, vectors: Path) -> None:
    """The address is made from the report; the certificate that lies there says itself for which chip and levels."""
    names = ("milan-v3-dstack", "milan-v3-azure-2", "genoa-v3-azure", "genoa-v3-microsoft", "siena-v5-lunal")
    for name in (*names, "turin-v5-microsoft"):
        folder = vectors / "sev-snp" / name
        (certificate,) = load_all((folder / "vcek.der").read_bytes(), "the VCEK")
        vek = Vek.parse(certificate)
        assert vek.hwid is not None
        parts = {"fmcSPL": "fmc", "blSPL": "bootloader", "teeSPL": "tee", "snpSPL": "snp", "ucodeSPL": "microcode"}
        query = "&".join(f"{key}={vek.tcb[part]:02}" for key, part in parts.items() if part in vek.tcb)
        roots = vectors / "sev-snp" / "amd-roots"
        pems = [(roots / f"{vek.product.lower()}_{which}.pem").read_bytes() for which in ("ask", "ark")]
        start = f"/vcek/v1/{vek.product}"
        case.vendors.recorded[f"{start}/{vek.hwid.hex()}?{query}"] = certificate.public_bytes(Encoding.DER)
        case.vendors.recorded[f"{start}/cert_chain"] = b"".join(pems)
        data = (folder / "report.bin").read_bytes()
        get = lambda data=data: case.cache.amd_certificates(SnpReport.parse(data))  # noqa: E731
        missing(get)
        case.cache.refresh()
        now = max(certificate.not_valid_before_utc, START)
        verified = verify_snp(data, get(), ark=TrustRoots().amd_ark, now=now, checks=Checks())
        assert verified.snp is not None
        assert verified.snp.product == vek.product


def test_real_manifests_come_as_nvidia_signed_them(case: Case, vectors: Path) -> None:
    folder = vectors / "nvidia-gpu" / "h100-550.90.07-full"
    names = {
        "NV_GPU_DRIVER_GH100_550.90.07": "driver_rim.xml",
        "NV_GPU_VBIOS_1010_0200_882_96009F0001": "vbios_rim.xml",
    }
    case.vendors.rims = {name: (folder / file).read_bytes() for name, file in names.items()}
    case.clock.now = datetime.datetime(2025, 10, 24, 12, tzinfo=datetime.UTC).timestamp()
    for name in names:
        missing(lambda name=name: case.cache.rim(name))
    case.cache.refresh()
    for name in names:
        assert case.cache.rim(name) == case.vendors.rims[name]
    # Their signers' certificates end in 2026.
    case.wait(400 * DAY)
    for name in names:
        assert "expired" in missing(lambda name=name: case.cache.rim(name))


def test_the_name_of_a_manifest_stays_a_name(case: Case) -> None:
    missing(lambda: case.cache.rim("../../x?y#z"))
    case.cache.refresh()
    assert case.paths == ["/v1/rim/..%2F..%2Fx%3Fy%23z"]


# What is kept, and for how long


@pytest.mark.parametrize("name", GETTERS)
def test_a_getter_never_fetches_and_a_refresh_does_once(case: Case, name: str) -> None:
    _, get = GETTERS[name]
    for _ in range(3):
        assert "has not answered yet" in missing(lambda: get(case.cache))
    assert case.paths == []
    case.cache.refresh()
    asked = len(case.paths)
    assert 1 <= asked <= 2
    first = get(case.cache)
    for _ in range(3):
        case.wait(MINUTE)
        assert get(case.cache) == first
    assert len(case.paths) == asked


def test_answers_are_renewed_ahead_of_their_end(case: Case) -> None:
    get = lambda: case.cache.ocsp(ocsp_der())  # noqa: E731
    missing(get)
    case.cache.refresh()
    first = get()
    case.wait(11 * HOUR)
    assert get() == first
    case.wait(2 * HOUR)  # Half of its 24 hours are over.
    assert get() != first
    assert len(case.paths) == 2


@pytest.mark.parametrize(("hours", "renewed"), [(4, 2 * HOUR), (24, 12 * HOUR), (240, 12 * HOUR), (0.01, MINUTE)])
def test_what_lives_longer_is_renewed_less_often_but_twice_a_day(case: Case, hours: float, renewed: float) -> None:
    case.vendors.ocsp_life = datetime.timedelta(hours=hours)
    missing(lambda: case.cache.ocsp(ocsp_der()))
    case.cache.refresh()
    case.wait(renewed - 1)
    assert len(case.paths) == 1
    case.wait(1)
    assert len(case.paths) == 2


def test_what_names_no_end_is_not_kept(case: Case) -> None:
    case.vendors.ocsp_life = None
    case.vendors.recorded["/vcek/v1/Milan/crl"] = without_next_update(case.vendors._crl("Milan"))
    for get in (lambda: case.cache.ocsp(ocsp_der()), lambda: case.cache.amd_crl("Milan")):
        missing(get)
        case.cache.refresh()
        assert "without an expiry" in missing(get)


def without_next_update(crl: bytes) -> bytes:
    """The list without the second of its two times (15 bytes each); its signature no longer holds."""
    times = [place for place in range(len(crl)) if crl[place : place + 2] == b"\x17\x0d"]
    cut = crl[: times[1]] + crl[times[1] + 15 :]
    assert (crl[:2], crl[3]) == (b"\x30\x81", 0x30)
    assert crl[4] < 0x80
    found = b"\x30\x81" + bytes([crl[2] - 15, 0x30, crl[4] - 15]) + cut[5:]
    assert x509.load_der_x509_crl(found).next_update_utc is None
    return found


@pytest.mark.parametrize("mode", FAILURES)
def test_what_is_there_stays_while_its_vendor_fails_until_its_end(case: Case, mode: str) -> None:
    get = lambda: case.cache.ocsp(ocsp_der())  # noqa: E731
    missing(get)
    case.cache.refresh()
    first = get()
    case.vendors.failing["/"] = mode
    for _ in range(23):
        case.wait(HOUR)
        assert get() == first
    case.wait(HOUR)
    assert case.server.url.removeprefix("http://") in missing(get)
    case.vendors.failing.clear()
    case.wait(HOUR)
    assert get() != first


def test_an_expired_answer_replaces_nothing(case: Case) -> None:
    get = lambda: case.cache.ocsp(ocsp_der())  # noqa: E731
    missing(get)
    case.cache.refresh()
    first = get()
    leaf, issuer = ocsp_pair()
    case.vendors.now = START - datetime.timedelta(days=3)
    case.vendors.recorded["/"] = case.vendors.ocsp_answer(leaf, issuer)
    case.wait(13 * HOUR)
    assert len(case.paths) == 2
    assert get() == first
    case.wait(11 * HOUR)
    assert "has expired" in missing(get)


@pytest.mark.parametrize("bound", [{"entries": 2}, {"size": 450}])
def test_the_one_asked_for_longest_ago_goes_first_when_there_are_too_many(bound: dict[str, int]) -> None:
    crls = {product: Vendors()._crl(product) for product in ("Milan", "Genoa", "Turin")}
    assert all(150 < len(crl) < 225 for crl in crls.values())  # Two fit into 450 bytes, three do not.
    fetched: list[str] = []

    def fetch(request: Request) -> bytes:
        fetched.append(request.url)
        return crls[request.url.split("/")[-2]]

    cache = VendorCache(fetch, Clock(), **bound)
    for product in ("Milan", "Genoa"):
        missing(lambda product=product: cache.amd_crl(product))
    cache.refresh()
    assert cache.amd_crl("Milan") == crls["Milan"]  # Genoa is now the one asked for longest ago.
    missing(lambda: cache.amd_crl("Turin"))
    cache.refresh()
    assert (cache.amd_crl("Milan"), cache.amd_crl("Turin")) == (crls["Milan"], crls["Turin"])
    missing(lambda: cache.amd_crl("Genoa"))
    assert fetched.count(f"{AMD_KDS}/vcek/v1/Milan/crl") == 1


def test_no_bound_makes_a_cache_raise_anything_else() -> None:
    cache = VendorCache(lambda request: Vendors()._crl("Milan"), Clock(), entries=0, size=0)
    for _ in range(3):
        missing(lambda: cache.amd_crl("Milan"))
        cache.refresh()


# Whatever they send


def real_answers() -> dict[str, bytes]:
    """One good answer of each kind. The manifest is not real: its form is tested with real ones."""
    vendors = Vendors()
    leaf, issuer = ocsp_pair()
    return {
        "chain": ask("Milan", "vcek").pem + ark("Milan").pem,
        "crl": vendors._crl("Turin"),
        "vcek": issue("a VCEK", ask("Milan", "vcek"), ca=False).der,
        "azure": vendors._azure()[1],
        "ocsp": vendors.ocsp_answer(leaf, issuer),
        "rim": json.dumps({"rim": base64.b64encode(b"<a/>").decode()}).encode(),
    }


ANY_GETTER = {
    **{name: get for name, (_, get) in GETTERS.items() if name != "vlek-chain"},
    "rim": lambda cache: cache.rim("NV_GPU_DRIVER_GH100_550.90.07"),
}


def kept(name: str, data: bytes) -> bool:
    """Whether the cache keeps it. Raises what the cache lets out."""
    chain = ask("Milan", "vcek").pem + ark("Milan").pem
    send = lambda request: chain if name == "vcek" and request.url.endswith("cert_chain") else data  # noqa: E731
    cache = VendorCache(send, Clock())
    missing(lambda: ANY_GETTER[name](cache))
    cache.refresh()
    try:
        ANY_GETTER[name](cache)
    except CollectionError:
        return False
    return True


@pytest.mark.parametrize("name", ["chain", "crl", "vcek", "azure", "ocsp"])
def test_answers_cut_anywhere_or_with_more_behind_are_not_kept(name: str) -> None:
    good = real_answers()[name]
    assert kept(name, good)
    whole = len(good.rstrip(b"\n")) if name == "chain" else len(good)  # PEM does without its last line's end.
    assert not any(kept(name, good[:end]) for end in range(whole))
    if name != "chain":  # PEM has text around it.
        assert not kept(name, good + b"\0")
    assert not any(kept(name, other) for kind, other in real_answers().items() if kind != name and name != "vcek")


PAIR = (ask("Milan", "vcek").pem + ark("Milan").pem).decode()


@pytest.mark.parametrize(
    "value",
    [
        None, 1, "text", [], {}, {"vcekCert": 1, "certificateChain": 2}, {"vcekCert": PAIR}, {"certificateChain": PAIR},
        {"vcekCert": PAIR, "certificateChain": PAIR}, {"vcekCert": "", "certificateChain": PAIR},
        {"vcekCert": "é", "certificateChain": PAIR}, {"vcekCert": "\ud800", "certificateChain": PAIR},
        {"rim": None}, {"rim": 1}, {"rim": []}, {"rim": ""}, {"rim": "é"}, {"rim": "\ud800"}, {"rim": "####"},
        {"rim": base64.b64encode(b"<a").decode()}, {"rim": base64.b64encode(b"<a/>").decode()},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["azure", "rim"])
def test_json_of_another_form_is_not_kept(name: str, value: object) -> None:
    assert not kept(name, json.dumps(value).encode())


@pytest.mark.parametrize("name", ["azure", "rim"])
@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 10_000, b"\xff\xfe", b'{"rim": NaN}'])
def test_json_that_python_does_not_read_is_not_kept(name: str, data: bytes) -> None:
    assert not kept(name, data)


def test_more_or_fewer_certificates_are_not_kept() -> None:
    one, three = ask("Milan", "vcek").pem, PAIR.encode() + ark("Milan").pem
    assert not any(kept("chain", data) for data in (one, three, b""))
    assert not kept("vcek", PAIR.encode())


@given(name=st.sampled_from(sorted(ANY_GETTER)), data=st.data())
@settings(max_examples=300, deadline=None)
def test_fuzz_a_vendor_s_answer_raises_nothing_but_collection_errors(name: str, data: st.DataObject) -> None:
    good = real_answers_once()[name]
    noise = data.draw(st.binary(max_size=200))
    place = data.draw(st.integers(0, len(good)))
    # Whether it is kept is the verifier's matter where it parses; `kept` raises for any other kind of error.
    kept(name, data.draw(st.sampled_from([noise, good[:place] + noise + good[place + len(noise) :], good + noise])))


_ANSWERS: dict[str, bytes] = {}


def real_answers_once() -> dict[str, bytes]:
    if not _ANSWERS:
        _ANSWERS.update(real_answers())
    return _ANSWERS

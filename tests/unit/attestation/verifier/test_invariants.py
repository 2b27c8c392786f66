"""Only our own errors escape; the package stands alone; verification, policy and devices do not know each other."""

import ast
import contextlib
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adytum.attestation.core.errors import AttestationError, EvidenceError, PolicyFileError
from adytum.attestation.document.evidence import Claims, CpuEvidence, Evidence, NonceProof
from adytum.attestation.policy.file import KEYS
from adytum.attestation.policy.policy import Policy
from adytum.attestation.reference import release
from adytum.attestation.reference.measurements import Measurements
from tests.unit.attestation.document.test_evidence import CLAIMS_JSON, DOCUMENT, DOCUMENT_JSON, dump, places, put
from tests.unit.attestation.support import CLAIMS, NONCE, ROOT, check, document

PLAIN = Evidence.parse(document(nonces=(NONCE,)))
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=300))
def test_bytes_into_parsers(data: bytes) -> None:
    for parse in (Evidence.parse, Claims.parse, Measurements.parse, release.parse):
        with contextlib.suppress(EvidenceError):
            parse(data)
    with contextlib.suppress(PolicyFileError):
        Policy.from_toml(data)


@given(json_values)
def test_json_into_parsers(value: object) -> None:
    for parse in (Evidence.parse, Claims.parse, Measurements.parse, release.parse):
        with contextlib.suppress(EvidenceError):
            parse(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@given(st.data())
def test_a_place_replaced(data: st.DataObject) -> None:
    """What `parse` accepts it also writes back the same."""
    for start, parse in ((DOCUMENT_JSON, Evidence.parse), (CLAIMS_JSON, Claims.parse)):
        at = data.draw(st.sampled_from(list(places(start))))
        encoded = dump(put(start, at, data.draw(json_values)))
        with contextlib.suppress(EvidenceError):
            assert parse(encoded).encode() == encoded


@given(st.integers(0, len(DOCUMENT)), st.integers(0, 40), st.binary(max_size=40))
def test_verify_takes_a_spliced_document_only_if_nothing_changed(at: int, length: int, inserted: bytes) -> None:
    data = DOCUMENT[:at] + inserted + DOCUMENT[at + length :]
    try:
        check(data)
    except AttestationError:
        assert data != DOCUMENT
    else:
        assert data == DOCUMENT


@given(
    st.builds(
        Evidence,
        claims=st.just(PLAIN.claims) | st.binary(max_size=40),
        nonces=st.just(PLAIN.nonces)
        | st.builds(
            NonceProof,
            st.binary(min_size=32, max_size=32),
            st.integers(0, 9),
            st.integers(0, 9),
            st.lists(st.binary(min_size=32, max_size=32), max_size=4).map(tuple),
        ),
        cpu=st.just(PLAIN.cpu)
        | st.builds(
            CpuEvidence,
            st.sampled_from(["simulated", "sev-snp", "x"]),
            st.just(PLAIN.cpu.report) | st.binary(max_size=260),
            st.just(PLAIN.cpu.certificates) | st.lists(st.binary(max_size=60), max_size=3).map(tuple),
        ),
        gpu=st.just(PLAIN.gpu) | st.binary(max_size=20),
    ),
    st.just(NONCE) | st.binary(max_size=40),
)
@settings(max_examples=300)
def test_verify_takes_any_parts_only_if_all_are_right(evidence: Evidence, nonce: bytes) -> None:
    try:
        check(evidence.encode(), nonce=nonce)
    except AttestationError:
        assert (evidence, nonce) != (PLAIN, NONCE)
    else:
        assert (evidence, nonce) == (PLAIN, NONCE)


@given(st.dictionaries(st.sampled_from(list(KEYS)), json_values, max_size=4))
def test_toml_values_into_policy(values: dict[str, object]) -> None:
    lines = dict(
        line.split(" = ", 1) for line in Policy.accept_simulated().to_toml().splitlines() if line[:1] not in "#"
    )
    lines |= {key: json.dumps(value) for key, value in values.items()}  # Some of it is TOML too.
    with contextlib.suppress(PolicyFileError):
        Policy.from_toml("\n".join(f"{key} = {value}" for key, value in lines.items()).encode())


def test_the_package_needs_the_standard_library_and_cryptography_only() -> None:
    code = """
import sys
before = set(sys.modules)
import adytum.attestation.__main__, adytum.attestation.collect.rounds, adytum.attestation.simulated.device
import adytum.attestation.verifier.document
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # Parts of `cryptography` with names of their own.
    assert set(done.stdout.split()) - {"_cffi_backend", "_openssl"} == {"adytum", "cryptography"}


def test_the_package_offers_what_a_relying_party_needs() -> None:
    from adytum import attestation
    from adytum.attestation.core.trust import TrustRoots
    from adytum.attestation.verifier.document import VerifiedEvidence, verify

    expected = (AttestationError, Policy, TrustRoots, VerifiedEvidence, verify)
    assert tuple(getattr(attestation, name) for name in attestation.__all__) == expected
    with pytest.raises(AttributeError, match="no attribute 'Verifier'"):
        _ = attestation.Verifier  # type: ignore[attr-defined]


def test_importing_one_room_does_not_load_the_verifier() -> None:
    code = """
import sys
import adytum.attestation.core.errors
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("adytum", "cryptography")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "adytum", "adytum.attestation", "adytum.attestation.core", "adytum.attestation.core.errors",
    ]  # fmt: skip


def test_parse_signature_policy_and_device_do_not_import_each_other() -> None:
    imported = {}
    for path in (ROOT / "attestation").rglob("*.py"):
        name = ".".join(("adytum", *path.relative_to(ROOT).with_suffix("").parts))
        tree = ast.parse(path.read_text())
        imported[name] = {
            module
            for node in ast.walk(tree)
            for module in (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if module.startswith("adytum.attestation")
        }

    def reaches(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for module in imported.get(waiting.pop(), ()):
                name = module if module in imported else module.rpartition(".")[0]
                if name not in found:
                    found.add(name)
                    waiting.append(name)
        return found

    judging = {"adytum.attestation.policy.policy", "adytum.attestation.policy.rules", "adytum.attestation.policy.file"}
    assert judging <= reaches("adytum.attestation.verifier.document")
    assert not judging & reaches("adytum.attestation.simulated.report")
    assert not {"adytum.attestation.simulated.report", "adytum.attestation.verifier.document"} & reaches(
        "adytum.attestation.policy.policy"
    )
    # Nor does verification reach what collects, or what fetches over the network.
    assert not {
        "adytum.attestation.simulated.device",
        "adytum.attestation.collect.rounds",
        "adytum.attestation.verifier.fetch",
    } & reaches("adytum.attestation.verifier.document")
    assert not {"adytum.attestation.verifier.document", *judging} & reaches("adytum.attestation.collect.rounds")
    pure = [
        *(f"core/{name}" for name in ("errors", "limits", "reader", "strict", "trust")),
        *("document/binding", "document/evidence", "document/facts", "policy/policy", "policy/rules"),
        *("verifier/cpu", "verifier/document", "verifier/pin"),
    ]
    for module in pure:
        source = (ROOT / "attestation" / f"{module}.py").read_text()
        names = {node.names[0].name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)}
        assert not names & {"socket", "time", "logging", "urllib", "asyncio", "subprocess"}, module


def test_claims_and_documents_are_not_confused() -> None:
    for parse, data in ((Claims.parse, DOCUMENT), (Evidence.parse, CLAIMS.encode())):
        try:
            parse(data)
        except EvidenceError:
            continue
        raise AssertionError(parse)

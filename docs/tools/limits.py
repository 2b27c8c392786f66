"""The page of limits: every peer-controlled quantity, its bound, what happens beyond it, and the test.

The numbers come from the frozen dataclasses and from the configuration's defaults; this file adds what the code cannot
state by itself. A limit that is missing here, or that no longer exists, is an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from reading import attribute_texts, cell

from adytum.attestation.core.limits import Limits as EvidenceLimits
from adytum.inference.channel.limits import Limits as ChannelLimits
from adytum.inference.core import config
from adytum.inference.gateway.limits import GatewayLimits


@dataclass(frozen=True)
class Row:
    """What the table adds to a number: what happens beyond the bound, and the test of it (`file::function`)."""

    beyond: str
    test: str
    what: str = ""
    """Replaces the attribute's text."""
    unit: str = "bytes"


CUT = "the connection is cut"
EVIDENCE = "`EvidenceError`: the document is refused as malformed"
RELEASE = "`EvidenceError`: the release is refused"

_CONNECTIONS = "tests/unit/gateway/edge/test_connections.py::"
_IMAGES = "tests/unit/gateway/admission/test_images.py::test_number_bytes_and_pixels_are_bounded"
_ONE_REQUEST = _CONNECTIONS + "test_what_one_request_asks_for_is_bounded"
_BHTTP = "tests/unit/channel/test_bhttp.py::test_limit"
_DOCUMENT = "tests/unit/attestation/document/test_evidence.py::test_document_refused"
_CLAIMS = "tests/unit/attestation/document/test_evidence.py::test_claims_refused"
_TOO_LARGE = "tests/unit/attestation/document/test_evidence.py::test_too_large"
_BOUNDS = "tests/unit/attestation/test_bounds.py::"

GATEWAY = {
    "head": Row(CUT, _CONNECTIONS + "test_a_head_that_is_too_large_is_cut_at_once"),
    "head_lines": Row(
        CUT, _CONNECTIONS + "test_a_head_that_is_too_large_is_cut_at_once", "Header lines of an outer request.", "lines"
    ),
    "head_seconds": Row(CUT, _CONNECTIONS + "test_a_head_that_comes_byte_by_byte_is_cut", unit="s"),
    "write_seconds": Row(
        "the connection is cut and the generation aborted",
        _CONNECTIONS + "test_a_reader_that_takes_nothing_is_cut_and_its_engine_let_go",
        unit="s",
    ),
    "pipelined": Row(CUT, _CONNECTIONS + "test_requests_ahead_of_their_answers_are_bounded", unit="requests"),
    "values": Row("413, sealed", _ONE_REQUEST, unit="characters"),
    "depth": Row("400, sealed", _ONE_REQUEST, unit="levels"),
    "choices": Row("400, sealed", _ONE_REQUEST, unit="sequences"),
    "images": Row("400, sealed", _IMAGES, unit="images"),
    "image_characters": Row("413, sealed", _IMAGES, unit="characters"),
    "image_pixels": Row("413, sealed", _IMAGES, unit="pixels"),
    "inputs": Row(
        "400, sealed",
        "tests/unit/gateway/admission/test_bounds.py::test_a_batch_has_at_most_so_many_texts",
        unit="texts",
    ),
    "stops": Row("400, sealed", _ONE_REQUEST, unit="sequences"),
    "template_values": Row("400, sealed", _ONE_REQUEST, unit="characters"),
}

CHANNEL = {
    "message": Row("413", "tests/unit/channel/test_ohttp.py::test_message_limit"),
    "chunk": Row("413", "tests/unit/channel/test_ohttp.py::test_chunk_limit"),
    "frame": Row("413", "tests/unit/channel/test_ehbp.py::test_limits"),
    "chunks": Row("413", "tests/unit/channel/test_ohttp.py::test_chunk_count_limit", unit="chunks"),
    "control": Row("413", _BHTTP),
    "field_lines": Row("413", _BHTTP, unit="lines"),
    "field_section": Row("413", _BHTTP),
    "informational": Row("the client refuses the answer", _BHTTP, unit="responses"),
    "padding": Row("413", _BHTTP),
}

ATTESTATION = {
    "document": Row(EVIDENCE, _TOO_LARGE),
    "claims": Row(EVIDENCE, _TOO_LARGE, "The claims."),
    "key_configurations": Row(EVIDENCE, _CLAIMS),
    "models": Row(EVIDENCE, _CLAIMS, "Models in the claims.", "models"),
    "aliases": Row(EVIDENCE, _CLAIMS, unit="names"),
    "text": Row(EVIDENCE, _CLAIMS, unit="characters"),
    "round": Row(
        "the round is not collected; a document that claims more is malformed",
        "tests/unit/attestation/collect/test_rounds.py::test_the_largest_round_verifies_and_one_more_is_refused",
        unit="nonces",
    ),
    "path": Row(EVIDENCE, _DOCUMENT, unit="hashes"),
    "report": Row(EVIDENCE, _DOCUMENT),
    "auxblob": Row(
        "collection fails",
        "tests/unit/attestation/tsm/test_device.py::test_failures_leave_nothing_behind",
        "Certificates that the host supplies with a report.",
    ),
    "certificates": Row(EVIDENCE, _DOCUMENT, "Certificates of one chain.", "certificates"),
    "certificate": Row(EVIDENCE, _BOUNDS + "test_a_certificate"),
    "gpu": Row(EVIDENCE, _BOUNDS + "test_the_gpu_bundle"),
    "gpus": Row(
        EVIDENCE,
        "tests/unit/attestation/nvidia/test_bundle.py::test_more_gpus_than_a_machine_has",
        "GPUs of one machine.",
        "GPUs",
    ),
    "tdx_collateral": Row(EVIDENCE, "tests/unit/attestation/tdx/test_verify.py::test_collateral_that_is_too_long"),
    "runtime_data": Row(EVIDENCE, "tests/unit/attestation/vtpm/test_hcl.py::test_fields_out_of_range"),
    "collateral": Row(EVIDENCE, "tests/unit/attestation/nvidia/test_rim_made.py::test_sizes"),
    "fetched": Row(
        "the answer is discarded",
        "tests/unit/attestation/collect/test_vendor_failures.py::test_an_answer_is_bounded",
    ),
    "cached": Row(
        "the answer that was used least recently is dropped",
        "tests/unit/attestation/collect/test_vendors.py"
        "::test_the_one_asked_for_longest_ago_goes_first_when_there_are_too_many",
    ),
    "rims": Row(EVIDENCE, _DOCUMENT, "NVIDIA's manifests in one document.", "manifests"),
    "ocsp": Row(EVIDENCE, _DOCUMENT, "OCSP answers in one document.", "answers"),
    "policy": Row(
        "`PolicyFileError`, or `EvidenceError` for a release",
        "tests/unit/attestation/policy/test_policy.py::test_files",
    ),
    "release_measurements": Row(
        RELEASE, _BOUNDS + "test_a_release", "Launch measurements of one version.", "measurements"
    ),
    "release_versions": Row(RELEASE, _BOUNDS + "test_a_release", unit="versions"),
    "release_keys": Row(RELEASE, _BOUNDS + "test_signatures_of_a_release", unit="keys"),
    "sequence": Row(
        "`PolicyFileError`",
        _BOUNDS + "test_a_minimum_sequence",
        "A release's sequence number; the largest integer that every JSON reader holds exactly.",
        "",
    ),
    "vcpus": Row(
        "refused",
        "tests/unit/attestation/reference/launch/test_measure.py::test_refused_numbers",
        unit="virtual CPUs",
    ),
}

CONFIGURED = {
    (config.ServerSection, "max_connections"): Row(
        "closed at once; the limit of open files is raised to fit, or the backend does not start",
        _CONNECTIONS + "test_more_connections_than_configured_are_closed_and_the_others_served",
        "Open connections.",
        "connections",
    ),
    (config.ServerSection, "max_requests"): Row(
        "503",
        "tests/unit/gateway/edge/test_routes.py::test_no_more_than_the_configured_requests_at_once",
        "Requests in progress, and so open HPKE contexts.",
        "requests",
    ),
    (config.ServerSection, "max_upload_mib"): Row(
        "503",
        _CONNECTIONS + "test_what_arrives_is_bounded_over_all_requests",
        "Bytes of all requests together while they arrive.",
        "MiB",
    ),
    (config.ServerSection, "request_seconds"): Row(
        "408, and the connection is cut after 3 s",
        _CONNECTIONS + "test_a_body_that_comes_too_slowly_is_answered_and_cut",
        "Time for a request's body to arrive.",
        "s",
    ),
    (config.EvidenceSection, "round_nonces"): Row(
        "503",
        "tests/unit/gateway/edge/test_evidence.py::test_a_full_round_refuses_one_more_and_then_goes_on",
        "Nonces that one hardware report serves.",
        "nonces",
    ),
    (config.EvidenceSection, "max_clients"): Row(
        "503 after a second",
        "tests/unit/gateway/edge/test_evidence.py::test_clients_that_do_not_read_are_bounded_and_let_go",
        "Clients that wait for evidence or read it; each has 30 s to read.",
        "clients",
    ),
    (config.EvidenceSection, "interval_s"): Row(
        "the client waits for the next report",
        "tests/unit/gateway/edge/test_evidence.py::test_one_round_per_interval",
        "Least time between the starts of two hardware reports.",
        "s",
    ),
    (config.Model, "max_requests"): Row(
        "503 with `Retry-After`, sealed",
        _CONNECTIONS + "test_a_model_has_so_many_requests_and_tokens_at_a_time",
        "Requests that one model's engine has, those that wait in it included.",
        "requests",
    ),
    (config.Model, "max_tokens"): Row(
        "503 with `Retry-After`, sealed",
        _CONNECTIONS + "test_a_model_has_so_many_requests_and_tokens_at_a_time",
        "Tokens of these requests: a quarter of the request's bytes, the longest answer it allows, 256 for an image "
        "and one for each 1,024 of its pixels.",
        "tokens",
    ),
}


_HEAD = """\
# Limits

<!-- Written by docs/tools/reference.py from the code. Change the code or docs/tools/limits.py, not this page. -->

Every peer-controlled quantity has a bound. Until a request is open the peer is anonymous; after that it is a caller
with a key. The gateway decompresses nothing: it has no decoder for `Content-Encoding`, inside or outside the seal, and
none for images, whose size it reads from their first bytes.

This page is generated from the frozen dataclasses that the code uses, so a number here is the number in force.
"""
_OPERATOR = """
## Set by the operator

Keys of the [configuration](configuration.md), with their defaults.
"""
_GATEWAY = """
## Requests at the gateway

`inference/gateway/limits.py`. An engine's answer that is not a stream has at most the size of one sealed message
(below); beyond that the client receives 502, sealed. Streams have no bound.
"""
_CHANNEL = """
## Sealed messages

`inference/channel/limits.py`. Client and gateway hold the same bounds. The status is the gateway's answer to a request;
a client refuses an answer that is too large.
"""
_EVIDENCE = """
## Evidence, policies and releases

`attestation/core/limits.py`. The sizes of what travels as base64 are those after decoding.
"""
_ELSEWHERE = """
## Bounded elsewhere

- Encapsulated keys that are remembered against replays: [keys](../explanation/keys.md#replays).
- Requests and tokens of one caller: [callers](../how-to/callers.md#limits).
- The event loop ends a TLS handshake that is never finished after 60 seconds. Until then it holds an open file and is
  not counted as a connection.
"""


def page() -> str:
    """The whole page."""
    parts = (
        (_HEAD, ()),
        (_OPERATOR, _table(_configured())),
        (_GATEWAY, _table(_frozen(GatewayLimits, GATEWAY))),
        (_CHANNEL, _table(_frozen(ChannelLimits, CHANNEL))),
        (_EVIDENCE, _table(_frozen(EvidenceLimits, ATTESTATION))),
        (_ELSEWHERE, ()),
    )
    return "".join("\n".join([text, *rows, ""]) if rows else text for text, rows in parts)


def tests() -> Iterator[str]:
    """Every test that the page names."""
    for rows in (GATEWAY, CHANNEL, ATTESTATION, CONFIGURED):
        yield from (row.test for row in rows.values())


def _frozen(owner: type, rows: dict[str, Row]) -> Iterator[tuple[str, ...]]:
    texts, values = attribute_texts(owner), {field.name: field.default for field in fields(owner)}
    if values.keys() != rows.keys():
        raise ValueError(f"docs/tools/limits.py and {owner.__name__} differ in {sorted(values.keys() ^ rows.keys())}")
    for name, row in rows.items():
        yield f"`{name}`", row.what or texts[name], _number(values[name], row.unit), row.beyond, row.test


def _configured() -> Iterator[tuple[str, ...]]:
    for (section, name), row in CONFIGURED.items():
        table = "models" if section is config.Model else section.__name__.removesuffix("Section").lower()
        yield f"`{table}.{name}`", row.what, _number(section.model_fields[name].default, row.unit), row.beyond, row.test


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        for factor, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
            if value % factor == 0:
                return f"{value // factor:,} {name}"
    return f"{value:,g} {unit}".strip() if isinstance(value, float) else f"{value:,} {unit}".strip()


def _table(rows: Iterator[tuple[str, ...]]) -> list[str]:
    lines = ["| name | quantity | bound | beyond it | test |", "|---|---|---:|---|---|"]
    for name, what, bound, beyond, test in rows:
        file, _, function = test.partition("::")
        words = function.removeprefix("test_").replace("_", " ")
        lines.append(f"| {name} | {cell(what)} | {bound} | {beyond} | [{words}](../../{file}) |")
    return lines

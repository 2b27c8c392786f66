"""Appraisal of a quote against Intel's collateral, by `dcap-qvl` (the extra `tdx`). Pure.

The collateral is one JSON object with nine strings, as Intel's caching services and `dcap-qvl` write it: TCB info, QE
identity, two CRLs, and the signatures and issuer chains of these; the binary ones are in hexadecimal.
"""

import datetime
import json

from adytum.attestation.core import strict
from adytum.attestation.core.errors import EvidenceError, Step, UnsupportedError, VerificationError
from adytum.attestation.core.limits import LIMITS, Limits
from adytum.attestation.document.facts import TdxFacts
from adytum.attestation.tdx.quote import TdxQuote

_TEXTS = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity")
_OCTETS = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")
_UNNEEDED = frozenset({"pck_certificate_chain"})
"""Some services add it. The quote has the chain, and a second one must not replace it."""


def appraise(
    data: bytes, quote: TdxQuote, collateral: bytes, *, root: bytes, now: datetime.datetime, limits: Limits = LIMITS
) -> tuple[TdxFacts, datetime.datetime]:
    """Appraises `quote`, parsed from `data`, at `now`: the facts, and when the first part of the collateral expires.

    `root` is the root certificate that was matched against the pins, DER. The collateral has to chain to it, whatever
    root the library brings.

    Raises `EvidenceError` for malformed collateral; `VerificationError` if the collateral is not valid at `now`, is not
    signed under `root`, revokes the platform's certificate, or knows no level for the platform; `UnsupportedError` if
    `dcap-qvl` is not installed.
    """
    fields = _fields(collateral, limits)
    try:
        import dcap_qvl  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise UnsupportedError(
            Step.CPU_REPORT, "appraising a TDX quote with collateral needs dcap-qvl: pip install 'adytum[tdx]'"
        ) from error
    seconds = int(now.timestamp())
    try:
        verifier = dcap_qvl.QuoteVerifier(root)
        claims = json.loads(
            verifier.verify_with_policy(
                data, dcap_qvl.QuoteCollateralV3(**fields), seconds, dcap_qvl.QuotePolicy.claims_only(seconds)
            ).to_json()
        )
        facts = TdxFacts(
            status=str(claims["tcb"]["status"]),
            advisory_ids=tuple(str(advisory) for advisory in claims["tcb"]["advisory_ids"]),
            tcb_evaluation=int(claims["tcb"]["eval_data_number"]),
        )
        valid_until = datetime.datetime.fromtimestamp(
            min(claims["earliest_expiration_date"], claims["qe_iden_earliest_expiration_date"]), datetime.UTC
        )
        (seen,) = claims["report"].values()
        seen = seen.get("base", seen)  # TDX 1.5 is 1.0 and two more fields.
        same = (seen["mr_td"], seen["report_data"]) == (quote.td.mrtd.hex(), quote.td.report_data.hex())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the Rust code is not an Exception.
        raise _wrong(f"the collateral does not support the quote on {now:%Y-%m-%d}: {_words(error)}") from error
    # The library parses the quote by itself: it has to have appraised the quote that was parsed here.
    if not same:
        raise _wrong("the appraisal is about another quote")
    return facts, valid_until


def _fields(collateral: bytes, limits: Limits) -> dict[str, str | bytes]:
    value = strict.read(collateral, "the TDX collateral", limits.tdx_collateral)
    if not isinstance(value, dict):
        raise EvidenceError("the TDX collateral is not a JSON object")
    if value.keys() - _UNNEEDED != {*_TEXTS, *_OCTETS}:
        raise EvidenceError(f"the TDX collateral does not have the fields {', '.join(sorted((*_TEXTS, *_OCTETS)))}")
    fields: dict[str, str | bytes] = {}
    for name in (*_TEXTS, *_OCTETS):
        text = value[name]
        if not isinstance(text, str):
            raise EvidenceError(f"the TDX collateral's {name} is not a string")
        try:
            text.encode("utf-8")  # JSON can name half a surrogate pair.
            fields[name] = bytes.fromhex(text) if name in _OCTETS else text
        except ValueError as error:
            raise EvidenceError(f"the TDX collateral's {name} cannot be read") from error
    return fields


def _words(error: BaseException) -> str:
    """The library's reason, in one line that cannot control a terminal."""
    return "".join(letter if " " <= letter <= "~" else " " for letter in str(error))[:200]


def _wrong(message: str) -> VerificationError:
    return VerificationError(Step.CPU_REPORT, "tdx.collateral", message)

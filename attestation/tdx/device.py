"""The TDX device: quotes through the kernel's configfs-tsm."""

from adytum.attestation.core.errors import AttestationError, CollectionError
from adytum.attestation.document.evidence import CpuEvidence
from adytum.attestation.tdx.quote import TdxQuote
from adytum.attestation.tsm.device import Tsm

PROVIDER = "tdx"


class Tdx:
    """Intel TDX. Its quotes contain their certificates."""

    provider = PROVIDER

    def __init__(self, tsm: Tsm | None = None) -> None:
        self._tsm = tsm or Tsm()

    def __repr__(self) -> str:
        return "Tdx()"

    def report(self, report_data: bytes) -> CpuEvidence:
        """A quote that carries `report_data`, 64 bytes. Raises `CollectionError`."""
        quote = self._tsm.report(report_data, "tdx_guest").outblob
        # A host's misconfigured quoting service is found here, and not by every client.
        try:
            parsed = TdxQuote.parse(quote)
        except AttestationError as error:
            raise CollectionError(f"the machine's quoting service gave no usable quote: {error}") from error
        if parsed.td.report_data != report_data:
            raise CollectionError("the machine's quoting service gave a quote for other report data")
        # Without the buffer's zero bytes: bytes after a quote are not signed.
        return CpuEvidence(PROVIDER, parsed.encoded, ())

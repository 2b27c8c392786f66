"""The firmware id (FWID) in a GPU's leaf certificate, in the two forms that NVIDIA uses."""

from cryptography import x509

from adytum.attestation.core.errors import EvidenceError

CHAIN_LENGTH = 5
"""Leaf, the GPU's boot ROM, provisioner, architecture, root."""
_TCG_FWID = "2.23.133.5.4.1"
_TCB_INFO = "2.23.133.5.4.1.1"
_SIZE = 48
_SEQUENCE, _OCTET_STRING = 0x30, 0x04
_FWIDS = 0xA6
"""[6] IMPLICIT, constructed: the list of FWIDs in DiceTcbInfo (TCG, DICE Attestation Architecture 1.1, 6.1.1)."""


def firmware(leaf: x509.Certificate) -> tuple[str, bytes]:
    """(hopper or blackwell, by the extension that is present; FWID, 48 bytes). Raises `EvidenceError`."""
    found = {
        extension.oid.dotted_string: extension.value.value
        for extension in leaf.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    if (_TCG_FWID in found) == (_TCB_INFO in found):
        raise EvidenceError("the GPU's certificate does not name one firmware, in one form")
    if _TCG_FWID in found:
        if len(found[_TCG_FWID]) < _SIZE:
            raise EvidenceError("the GPU's certificate has a firmware id that is too short")
        return "hopper", found[_TCG_FWID][-_SIZE:]
    return "blackwell", _first_fwid(found[_TCB_INFO])


def _first_fwid(tcb_info: bytes) -> bytes:
    """DiceTcbInfo ::= SEQUENCE {..., fwids [6] IMPLICIT SEQUENCE OF SEQUENCE {hashAlg OID, digest OCTET STRING}}."""
    (fields,) = _values(tcb_info, _SEQUENCE)
    lists = [value for tag, value in _elements(fields) if tag == _FWIDS]
    if len(lists) != 1:
        raise EvidenceError("the GPU's certificate has no list of firmware ids")
    first = _elements(lists[0])[0]
    digests = [value for tag, value in _elements(first[1]) if tag == _OCTET_STRING]
    if first[0] != _SEQUENCE or len(digests) != 1 or len(digests[0]) != _SIZE:
        raise EvidenceError("the GPU's certificate has a firmware id that is not 48 bytes")
    return digests[0]


def _values(data: bytes, tag: int) -> list[bytes]:
    elements = _elements(data)
    if len(elements) != 1 or elements[0][0] != tag:
        raise EvidenceError("the GPU's certificate has firmware ids in an unknown form")
    return [value for _, value in elements]


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """The DER elements that fill `data`; at least one. Raises `EvidenceError`."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        header = data[at : at + 2]
        at += 2
        size = header[1] if len(header) == 2 else 0x80
        if size > 0x82:
            size = 0x80
        if size > 0x80:
            octets = size - 0x80
            size = int.from_bytes(data[at : at + octets], "big")
            at += octets
        elif size == 0x80:
            raise EvidenceError("the GPU's certificate has firmware ids that are not DER")
        if at + size > len(data):
            raise EvidenceError("the GPU's certificate has firmware ids that end too early")
        found.append((header[0], data[at : at + size]))
        at += size
    if not found:
        raise EvidenceError("the GPU's certificate has an empty list of firmware ids")
    return found

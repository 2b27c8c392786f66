"""Ed25519 public keys to refuse: under a point of small order anybody can sign (RFC 8032, section 5.1)."""

_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
_COFACTOR_DOUBLINGS = 3


def small_order(public: bytes) -> bool:
    """Whether the 32 bytes encode a point whose order divides 8, as the zero bytes of an unfilled example do."""
    y = int.from_bytes(public, "little") % 2**255 % _P
    # x squared is enough: doubling a point needs x and the product xy only squared. The sign of x changes no order.
    x2 = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    for _ in range(_COFACTOR_DOUBLINGS):
        y2 = y * y % _P
        product = _D * x2 * y2 % _P
        x2, y = (
            4 * x2 * y2 * pow(1 + product, -2, _P) % _P,
            (y2 + x2) * pow(1 - product, -1, _P) % _P,
        )
    return y == 1

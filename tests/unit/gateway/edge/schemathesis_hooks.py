"""For the schemathesis run of `test_openapi.py`: how bodies of Oblivious HTTP are written and read, as bytes."""

from typing import Any

import schemathesis

SEALED = ("message/ohttp-chunked-req", "message/ohttp-req")
ANSWERS = ("message/ohttp-chunked-res", "message/ohttp-res")


@schemathesis.serializer(*SEALED)
def write(_context: Any, value: Any) -> bytes:
    data = getattr(value, "data", value)
    return data if isinstance(data, bytes) else str(data).encode()


@schemathesis.deserializer(*ANSWERS)
def read(_context: Any, response: Any) -> str:
    return str(response.content.decode("latin-1"))

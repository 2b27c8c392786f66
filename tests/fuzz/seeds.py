"""Where each search begins: well-formed input of every shape that the code tells apart."""

import json

from adytum.inference.channel import bhttp, hpke, keyconfig
from adytum.inference.channel.bhttp import RequestHead, ResponseHead
from adytum.inference.channel.hpke import KemId
from adytum.inference.channel.keyconfig import KeyConfiguration
from tests.pictures import REDS, data_url, png

_REQUEST = RequestHead("POST", "https", "a", "/v1/x?y", ((b"authorization", b"Bearer k"), (b"accept", b"")))
_RESPONSE = ResponseHead(200, ((b"content-type", b"text/event-stream"),))
_TRAILERS = ((b"adytum-receipt", b"a.b.c"),)
_BODIES = [
    {"model": "latest", "messages": [{"role": "user", "content": "hello"}], "stream": True, "stream_options": None},
    {"model": "latest", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
    {"model": "latest", "messages": [{"content": [{"image_url": data_url(png(width=1, height=1))}]}]},
    {"model": "latest", "messages": [{"content": [{"type": "image", "source": {"media_type": "image/png", "data": ""}}]}]},
    {"model": "latest", "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "uuid": "u"}]}]},
    {"model": "latest", "prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": False}},
    {"model": "demo/e5", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 4},
    {"model": "latest", "input": [{"type": "message", "role": "user", "content": "a"}], "store": True},
    {"model": "latest", "max_tokens": 5, "system": [{"type": "text", "text": "s"}], "messages": []},
    {"model": "latest", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "priority": 1},
    {"model": "latest", "prompt_cache_key": "k", "kv_transfer_params": {}, "cache_salt": "mine", "seed": 1e999},
    {"model": "latest", "source": {"type": "url", "url": "http://a"}, "messages": [{"content": {"video_url": ""}}]},
]  # fmt: skip


def seeds() -> dict[str, list[bytes]]:
    """By target."""
    messages = []
    for mark, head in ((b"\x01", _REQUEST), (b"\x00", _RESPONSE)):
        whole = bhttp.encode(head, b"content", _TRAILERS)
        chunked = bhttp.encode_head(head) + bhttp.encode_content(b"con") + bhttp.encode_content(b"tent")
        messages += [mark + whole, mark + whole + bytes(9), mark + chunked + bhttp.encode_end(_TRAILERS)]
        messages += [mark + chunked + bhttp.encode_end(), mark + bhttp.encode(head), mark + bhttp.encode_head(head)]
    framed = [bytes((3, 20, 10, 2, 7)) + b"x" * 200 + bytes((1, way, 1, 1, 1)) for way in range(7)]
    keys = [KeyConfiguration(i, kem, hpke.generate(kem).public_bytes) for i, kem in enumerate(KemId)]
    listed = [keyconfig.encode_list((key,)) for key in keys] + [keyconfig.encode_list(tuple(keys))]
    return {
        "binary_http": messages,
        "ohttp_framing": framed,
        "ehbp_framing": framed,
        "json_admission": [b"/v1/chat/completions\n" + json.dumps(body).encode() for body in _BODIES],
        "image_size": list(REDS.values()),
        "evidence_query": [b"nonce=" + b"0" * 64, b"nonce=" + b"A" * 64, b"nonce=", b"nonce=%30", b"a=b&nonce=1"],
        "key_list": listed,
        "receipt": [b"e30.e30.AA", b"eyJhbGciOiJFZERTQSIsInR5cCI6ImNsb2lzdGVyLXJlY2VpcHQrandzIn0.e30." + b"A" * 86],
    }

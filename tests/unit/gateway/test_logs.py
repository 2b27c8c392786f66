"""A fault of ours never quotes content: not in the log, not in the answer."""

import asyncio
import logging
from pathlib import Path

import pytest

from adytum.inference.channel import ohttp
from adytum.inference.core.config import parse
from adytum.inference.core.logs import names_only
from adytum.inference.gateway.edge.app import GATEWAY_PATH
from tests.support import config_text, open_answer, seal
from tests.unit.gateway.support import running_gateway

CANARY = "canary-5d1c77"


def test_an_exception_in_the_loop_leaves_its_types_name(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        names_only(asyncio.get_running_loop())
        asyncio.get_running_loop().call_soon(lambda: int(CANARY))
        lost = asyncio.ensure_future(asyncio.to_thread(int, CANARY))
        await asyncio.sleep(0.1)
        del lost
        logging.getLogger("uvicorn.error").error(CANARY)

    asyncio.run(fail())
    assert "ValueError" in caplog.text
    assert CANARY not in caplog.text


class Broken:
    """Stands in for a part of the gateway that has a fault."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(CANARY)


@pytest.mark.parametrize("part", ["_keys", "_admission", "_engines"])
def test_a_fault_anywhere_is_answered_with_a_fixed_text(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse(config_text(port=0, runtime=tmp_path).encode())
    with running_gateway(config, tmp_path) as gateway:
        setattr(gateway.sealed, part, Broken())
        sealer = ohttp.RequestSealer(ohttp.CHUNKED, gateway.configuration())
        request = {"model": "latest", "messages": [{"role": "user", "content": CANARY}]}
        status, _, wire = gateway.request(
            "POST", GATEWAY_PATH, seal(sealer, request), {"Content-Type": ohttp.CHUNKED.request}
        )
        if part == "_keys":
            assert status == 500
            assert b"Nothing about the cause" in wire
        else:
            assert status == 200
            answer = open_answer(sealer, wire)
            assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
            assert CANARY.encode() not in answer.content
    assert "RuntimeError" in caplog.text
    assert CANARY not in caplog.text
    assert CANARY.encode() not in wire

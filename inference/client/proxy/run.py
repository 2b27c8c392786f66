"""`adytum proxy`: starts the application, serves until a signal, and ends what is in progress within a few seconds."""

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path

import click
from aiohttp import web

from adytum.attestation.core.errors import AttestationError
from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.inference.client.proxy.app import create_app
from adytum.inference.client.proxy.guard import in_url, is_address
from adytum.inference.client.proxy.replicas import Replicas
from adytum.inference.client.proxy.upstream import UpstreamClient
from adytum.inference.client.session import Upstream
from adytum.inference.client.workspace import Workspace

_log = logging.getLogger("adytum.proxy")
# aiohttp logs exceptions with their text, which can quote a request. This logger has no parent and no name in the
# registry, so no configuration of logging can turn it on.
_SILENT = logging.Logger("aiohttp", logging.CRITICAL + 1)
KEEP_ALIVE_S = 65.0
"""Seconds after which an idle connection is closed: longer than clients usually keep one."""
GRACE_S = 5.0
"""Seconds for requests in progress when the proxy is stopped."""


class CannotStart(click.ClickException):
    """An option is invalid, or the address cannot be used."""


def run_proxy(
    *,
    upstreams: Sequence[str],
    policy_path: str | PathLike[str],
    host: str = "127.0.0.1",
    port: int = 9876,
    api_key: str | None = None,
    workspace: str | PathLike[str] | None = None,
    kem: str | None = None,
    ready: Callable[[str], None] | None = None,
    trust: TrustRoots | None = None,
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> None:
    """Serves until a signal. `ready` is called with the endpoint's URL once it listens. Raises `CannotStart`."""
    try:
        policy = Policy.from_toml(Path(policy_path))
        if policy.release.required != "none" and workspace is None:
            _log.warning("without a workspace no release is remembered: only the policy's minimum refuses older ones")
        record = Workspace(workspace).record if workspace is not None else None
        clients = [
            UpstreamClient(Upstream(url, policy=policy, trust=trust, kem=kem, record=record), api_key)
            for url in upstreams
        ]
        # A single one is asked even if it failed lately: its own error says more than that no upstream is left.
        client = clients[0] if len(clients) == 1 else Replicas(clients)
        listening = _listen(host, port)
    except AttestationError as error:
        raise CannotStart(f"{policy_path}: {error}") from error
    except (ValueError, OSError) as error:
        raise CannotStart(str(error)) from error
    url = f"http://{in_url(host)}:{listening.getsockname()[1]}/v1"
    if not _is_loopback(host):
        _log.warning("listening on %s: any machine that reaches it may use it, and its traffic is in the clear", host)

    def announce() -> None:
        _log.info("listening on %s for %s", url, ", ".join(upstreams))
        if ready is not None:
            ready(url)

    app = create_app(client, bound=host, allow_hosts=allow_hosts, allow_origins=allow_origins)
    with listening:
        terminated = asyncio.run(_until_signal(app, listening, announce))
    if terminated:
        # Ends the process as the signal would have, so that its parent can tell.
        signal.raise_signal(signal.SIGTERM)


async def _until_signal(app: web.Application, listening: socket.socket, ready: Callable[[], None]) -> bool:
    """Serves; returns whether SIGTERM ended it. On SIGINT `asyncio.run` cancels it and raises `KeyboardInterrupt`."""
    stop = asyncio.Event()
    # Windows has no such handlers, and only the main thread may set them.
    with suppress(RuntimeError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(app, listening, ready, stop)
    return stop.is_set()


async def serve(
    app: web.Application,
    listening: socket.socket,
    ready: Callable[[], None],
    stop: asyncio.Event,
    grace_s: float = GRACE_S,
) -> None:
    """Serves until `stop` is set or it is cancelled; requests in progress then have `grace_s` seconds to end."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=KEEP_ALIVE_S,
        # aiohttp waits this long twice: for a handler to end, and then for it to react to its closed request.
        shutdown_timeout=grace_s / 2,
        access_log=None,
        logger=_SILENT,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        ready()
        await stop.wait()
    finally:
        await runner.cleanup()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotStart(f"cannot listen on {host} port {port} ({error.strerror}); choose another port") from error


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)

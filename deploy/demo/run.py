"""`make serve` and `make demo`: the backend and a local client proxy, started and stopped together."""

import argparse
import asyncio
import json
import signal
import sys

from adytum.deploy.demo import scenes
from adytum.deploy.demo.processes import POLICY, Failed, backend, proxy
from adytum.deploy.demo.relay import Relay


def main() -> int:
    """Runs the chosen scene. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adytum.deploy.demo.run", description=__doc__)
    parser.add_argument("scene", choices=("serve", "demo"))
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--proxy-port", type=int, default=9876)
    options = parser.parse_args()
    # A request to stop is an exception, so that every `with` below ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        with backend(options.port):
            if options.scene == "serve":
                with proxy(options.port, options.proxy_port):
                    _print_lines(options.proxy_port)
                    _wait()
            else:
                asyncio.run(_demo(options.port, options.proxy_port))
    except KeyboardInterrupt:
        print("\nstopped; no process is left", flush=True)
        return 0
    except Failed as failed:
        print(f"\n{failed}", file=sys.stderr)
        return 1
    return 0


def _interrupt() -> None:
    raise KeyboardInterrupt


def _print_lines(port: int) -> None:
    base = f"http://localhost:{port}/v1"
    chat = {
        "model": "latest",
        "stream": True,
        "messages": [{"role": "user", "content": "What is remote attestation?"}],
    }
    embed = {"model": "demo/e5", "input": "Who can read my prompt?"}
    header = "-H 'Content-Type: application/json'"
    print(
        f"""
The backend serves. Everything between the proxy and it is sealed. Try, in another terminal:

  curl {base}/models
  curl -N {base}/chat/completions {header} -d '{json.dumps(chat)}'
  curl {base}/embeddings {header} -d '{json.dumps(embed)}'

The evidence here is simulated: it shows how verification works and proves nothing about hardware.
Ctrl-C stops everything.""",
        flush=True,
    )


def _wait() -> None:
    while True:
        signal.pause()


async def _demo(port: int, proxy_port: int) -> None:
    relay = Relay(port)
    relay_port = await relay.start()
    try:
        with proxy(relay_port, proxy_port):
            await scenes.play(relay, f"http://127.0.0.1:{relay_port}", f"http://127.0.0.1:{proxy_port}", POLICY)
    finally:
        await relay.stop()


if __name__ == "__main__":
    sys.exit(main())

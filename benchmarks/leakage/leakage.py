"""What the network learns about a stream from sizes and times: traces of real answers, and an attacker on topics.

    python -m adytum.benchmarks.leakage.leakage [--protocols ohttp ehbp] [--wordings 10] [--out FILE]
    python -m adytum.benchmarks.leakage.leakage --traces FILE         (only the attack, on recorded traces)

One demo engine (vLLM) answers every wording of every question of docs/faq.md, over one gateway per shape of answers
(`inference/channel/shaping.py`); each question goes to all gateways in turn before the next one. A trace is what the
network sees of an answer: the size and the time of each write (HTTP's own chunks; TLS would add a constant to each).
The attacker of `benchmarks/leakage/attack.py` distinguishes the page's eight sections, its topics.
"""

import argparse
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import h11

from adytum.benchmarks.channel.gateway import gateway_process
from adytum.benchmarks.leakage import attack
from adytum.benchmarks.load.load import ehbp_configuration
from adytum.benchmarks.processes import python, wait_for
from adytum.benchmarks.runfile import stats
from adytum.deploy.demo import faq
from adytum.deploy.demo.processes import ROOT, backend
from adytum.inference.channel import bhttp, ehbp, hpke, keyconfig, ohttp
from adytum.inference.channel.bhttp import Content, RequestHead
from adytum.inference.channel.exchange import Shape
from adytum.inference.channel.padding import Padding
from adytum.inference.channel.shaping import Cells

MODEL = "demo/llama-awq"
PATH = "/v1/chat/completions"
SOCKET = ROOT / "var" / "run" / "demo-llama-awq" / "engine.sock"
# The demo's engine makes a token of about 230 bytes in 2 to 3 ms, so a cell has room for twice the bytes of 10 ms. All
# answers of the page end within the 32 cells of 320 ms.
SHAPES: dict[str, Shape] = {
    "off": Padding.OFF,
    "pad": Padding.PAD,
    "constant": Cells(2048, 32, 0.01),
    # So short that answers differ in their number of cells: this shows what the doubling leaks.
    "constant, least 4": Cells(2048, 4, 0.01),
}
_JSON = ((b"content-type", b"application/json"),)
_WORD = re.compile(rb'"content": ?"[^"]')
_SECONDS = 30


@dataclass
class Trace:
    """One answer. `times`, `words`: seconds from the sending of the request to each write, and to each word."""

    protocol: str
    shape: str
    topic: str
    question: str
    wording: str
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    content: int = 0
    """Bytes of the engine's events, without padding."""


def questions(page: Path) -> list[tuple[str, faq.Entry]]:
    """Each entry with its topic, which is its section."""
    entries = {entry.question: entry for entry in faq.load(page)}
    topic, found = "", []
    for line in page.read_text().splitlines():
        if line.startswith("## "):
            topic = line.removeprefix("## ")
        elif line.startswith("### "):
            found.append((topic, entries[line.removeprefix("### ")]))
    return found


class Client:
    """Asks one gateway, with a connection for each request, and records what the network sees of the answer."""

    def __init__(self, protocol: str, port: int) -> None:
        self._port = port
        self._protocol = protocol
        configurations = keyconfig.decode_list(self._get("/.well-known/ohttp-gateway"))
        self._configuration = configurations[0]
        self._key = ehbp_configuration(self._get("/.well-known/hpke-keys")).public_key

    def ask(self, body: bytes, trace: Trace) -> None:
        """Fills `trace` with one answer. Raises `RuntimeError` if it is not a complete stream."""
        if self._protocol == "ohttp":
            sealer = ohttp.RequestSealer(ohttp.CHUNKED, self._configuration)
            message = bhttp.encode(RequestHead("POST", "https", "backend", PATH, _JSON), body)
            request = sealer.start() + sealer.final(message)
            headers = {"Content-Type": ohttp.CHUNKED.request}
            head, writes = self._send("POST", "/.well-known/ohttp-gateway", headers, request)
            opener = sealer.response()
            decoder = bhttp.Decoder("response")
            plain = [decoder.feed(opener.feed(data)) for data, _ in writes]
            plain[-1] += decoder.feed(opener.finish()) + decoder.finish()
            contents = [b"".join(item.data for item in found if isinstance(item, Content)) for found in plain]
        else:
            enc, context = hpke.setup_sender(ehbp.SUITE, self._key, b"ehbp request")
            frame = context.seal(body)
            headers = {ehbp.REQUEST_HEADER: enc.hex(), "Content-Type": "application/json"}
            head, writes = self._send("POST", PATH, headers, len(frame).to_bytes(4, "big") + frame)
            nonce = bytes.fromhex(head[ehbp.RESPONSE_HEADER])
            sequence = ehbp.response_sequence(context.export(b"ehbp response", 32), enc, nonce)
            contents = [_frames(sequence, data) for data, _ in writes]
        if b"data: [DONE]" not in b"".join(contents)[-100_000:]:
            raise RuntimeError(f"not a complete stream: {b''.join(contents)[:200]!r}")
        for content, (data, when) in zip(contents, writes, strict=True):
            trace.sizes.append(len(data))
            trace.times.append(when)
            trace.words += [when] * len(_WORD.findall(content))
            trace.content += sum(len(line) + 2 for line in content.split(b"\n\n") if line.startswith(b"data:"))

    def _get(self, path: str) -> bytes:
        return b"".join(data for data, _ in self._send("GET", path, {}, b"")[1])

    def _send(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[dict[str, str], list[tuple[bytes, float]]]:
        """The answer's header, and its writes with their times."""
        connection = h11.Connection(h11.CLIENT)
        lines = [("Host", "backend"), ("Content-Length", str(len(body))), *headers.items()]
        wire = connection.send(h11.Request(method=method, target=path, headers=lines)) or b""
        wire += connection.send(h11.Data(data=body)) or b""
        wire += connection.send(h11.EndOfMessage()) or b""
        found: dict[str, str] = {}
        writes: list[tuple[bytes, float]] = []
        write = b""
        with socket.create_connection(("127.0.0.1", self._port), timeout=_SECONDS) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent = time.perf_counter()
            stream.sendall(wire)
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(stream.recv(65_536))
                    now = time.perf_counter() - sent
                elif isinstance(event, h11.Response):
                    found = {name.decode(): value.decode() for name, value in event.headers}
                    if event.status_code != 200:
                        raise RuntimeError(f"the gateway answered {event.status_code}")
                elif isinstance(event, h11.Data):
                    write += event.data
                    if event.chunk_end or "content-length" in found:
                        writes.append((write, now))
                        write = b""
                elif isinstance(event, h11.EndOfMessage):
                    return found, writes
                else:
                    raise RuntimeError("the gateway closed the connection")


def _frames(sequence: hpke.Sequence, data: bytes) -> bytes:
    """The plaintext of one write, which contains whole frames only."""
    found, at = b"", 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        found += sequence.open(data[at + 4 : end])
        at = end
    return found


@contextlib.contextmanager
def gateways(port: int) -> Iterator[dict[str, int]]:
    """A gateway for each shape, in front of the one engine. Yields their ports."""
    ports = {name: port + at for at, name in enumerate(SHAPES)}
    with contextlib.ExitStack() as stack:
        for name, shape in SHAPES.items():
            stack.enter_context(python(gateway_process, str(SOCKET), ports[name], shape))
        if not all(wait_for(value, 30) for value in ports.values()):
            raise SystemExit("a gateway did not start")
        yield ports


def record(options: argparse.Namespace) -> list[Trace]:
    """All traces: each wording with every shape and protocol before the next wording."""
    asked = [
        (topic, entry.question, wording)
        for topic, entry in questions(ROOT / "docs" / "faq.md")
        for wording in (entry.question, *entry.paraphrases)[: options.wordings]
    ]
    rng = Random(20261123)
    rng.shuffle(asked)
    traces = []
    with backend(options.port), gateways(options.port + 1) as ports:
        clients = {(p, s): Client(p, port) for p in options.protocols for s, port in ports.items()}
        order = list(clients)
        for at, (topic, question, wording) in enumerate(asked):
            # Warm-up: the first question goes round twice, its first answers dropped.
            for arm in order if at == 0 else ():
                clients[arm].ask(_body(wording, 0), Trace(*arm, topic, question, wording))
            rng.shuffle(order)
            for arm in order:
                trace = Trace(*arm, topic, question, wording)
                clients[arm].ask(_body(wording, rng.randrange(2**31)), trace)
                traces.append(trace)
            if at % 50 == 49:
                print(f"{at + 1} of {len(asked)} wordings", flush=True)
    return traces


def _body(wording: str, seed: int) -> bytes:
    return json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "messages": [{"role": "user", "content": wording}],
            "temperature": 0.7,
            "seed": seed,
            "max_tokens": 120,
        }
    ).encode()


def costs(traces: list[Trace]) -> str:
    """What each shape costs compared with `off`: bytes, time to first word, gaps between words, the answer's time."""
    lines = [
        f"{'protocol':>8} {'shape':>18} {'bytes':>8} {'of content':>10} {'TTFT ms p50/p99':>16} "
        f"{'gap ms p50/p99':>15} {'last word ms p50':>16} {'end ms p50':>10}"
    ]
    for protocol, shape, mine in _arms(traces):
        ttft = [trace.words[0] * 1000 for trace in mine]
        gaps = [(b - a) * 1000 for trace in mine for a, b in zip(trace.words, trace.words[1:], strict=False)]
        size = stats.mean([sum(trace.sizes) for trace in mine])
        lines.append(
            f"{protocol:>8} {shape:>18} {size:>8.0f} {size / stats.mean([t.content for t in mine]):>10.2f} "
            f"{_two(ttft):>16} {_two(gaps):>15} {stats.percentile([t.words[-1] * 1000 for t in mine], 0.5):>16.0f} "
            f"{stats.percentile([t.times[-1] * 1000 for t in mine], 0.5):>10.0f}"
        )
    return "\n".join(lines)


def _arms(traces: list[Trace]) -> Iterator[tuple[str, str, list[Trace]]]:
    for protocol in ("ohttp", "ehbp"):
        for shape in SHAPES:
            if mine := [trace for trace in traces if (trace.protocol, trace.shape) == (protocol, shape)]:
                yield protocol, shape, mine


def _two(values: list[float]) -> str:
    return f"{stats.percentile(values, 0.5):.1f}/{stats.percentile(values, 0.99):.1f}"


def main() -> None:
    """Records or reads the traces, and prints the costs and what the attacker learns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocols", nargs="+", choices=["ohttp", "ehbp"], default=["ohttp", "ehbp"])
    parser.add_argument("--wordings", type=int, default=10, help="of each question, at most")
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "bench" / "leakage.json")
    parser.add_argument("--traces", type=Path, help="recorded traces: run only the attack")
    options = parser.parse_args()
    if options.traces is not None:
        found: list[dict[str, Any]] = json.loads(options.traces.read_text())
        traces = [Trace(**item) for item in found]
    else:
        traces = record(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(trace) for trace in traces]))
        print(f"traces: {options.out}")
    print(costs(traces), flush=True)
    print(attack.HEAD)
    for protocol, shape, mine in _arms(traces):
        seen = [attack.Seen(trace.topic, trace.question, trace.wording, trace.sizes, trace.times) for trace in mine]
        for row in attack.rows(seen):
            print(f"{protocol:>8} {shape:>18} {row}", flush=True)


if __name__ == "__main__":
    main()

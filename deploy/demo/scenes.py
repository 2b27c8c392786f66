"""What `make demo` shows: verification, a conversation, a search, a tampering attempt, and the network's view."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import httpx2

from adytum.attestation.core.trust import TrustRoots
from adytum.attestation.policy.policy import Policy
from adytum.attestation.verifier.document import VerifiedEvidence, verify
from adytum.deploy.demo.faq import load as load_faq
from adytum.deploy.demo.processes import Failed
from adytum.deploy.demo.relay import Relay

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("What is remote attestation?", "Who can read my prompt?")
SEARCHES = ("who is able to see what I typed", "how often are keys replaced")
_WIDTH = 16


async def play(relay: Relay, upstream: str, proxy: str, policy: Path) -> None:
    """Plays all scenes through `proxy`, which reaches the backend through `relay`. Raises `Failed` if one fails."""
    async with httpx2.AsyncClient(timeout=120) as client:
        _show_verified(await _verify(client, upstream, policy))
        typed = await _converse(client, relay, proxy)
        await _search(client, proxy)
        await _tamper(client, relay, proxy)
        public = await client.get(f"{upstream}/.well-known/attestation", params={"nonce": "0" * 64})
        _show_network(relay, typed, public.content)


async def _verify(client: httpx2.AsyncClient, upstream: str, policy: Path) -> VerifiedEvidence:
    nonce = os.urandom(32)
    answer = await client.get(f"{upstream}/.well-known/attestation", params={"nonce": nonce.hex()})
    answer.raise_for_status()
    return verify(
        answer.content,
        nonce=nonce,
        policy=Policy.from_toml(policy),
        trust=TrustRoots(),
        now=datetime.datetime.now(datetime.UTC),
    )


def _show_verified(evidence: VerifiedEvidence) -> None:
    claims = evidence.claims
    _title("1. What was verified before a word was sent")
    print(f"  CPU evidence      {evidence.provider}  (simulated: shows the steps, proves nothing about hardware)")
    print(f"  document          SHA-256 {evidence.document_sha256.hex()}")
    print(f"  bound to          a nonce made here, {len(claims.key_configurations)} bytes of keys, the claims below")
    print(f"  configuration     SHA-256 {claims.configuration_sha256.hex()}")
    print(f"  padding, sandbox  {claims.padding}, {claims.sandbox}")
    for model in claims.models:
        print(f"  model             {model.id} ({model.task}), weights {model.weights_root.hex()[:32]}...")


async def _converse(client: httpx2.AsyncClient, relay: Relay, proxy: str) -> list[str]:
    _title("2. A conversation, each token sealed as the engine makes it")
    words: list[str] = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        print(f"  you:     {question}\n  backend: ", end="", flush=True)
        said = ""
        body = {"model": "latest", "messages": messages, "stream": True, "temperature": 0, "max_tokens": 120}
        async with client.stream("POST", f"{proxy}/v1/chat/completions", json=body) as answer:
            _expect(answer.status_code == 200, f"the chat was answered {answer.status_code}")
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    piece = _delta(json.loads(line[6:]))
                    said += piece
                    print(piece, end="", flush=True)
        print()
        _expect(bool(said.strip()), "the answer was empty")
        words += [question, said.strip()]
    return words


def _delta(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


async def _search(client: httpx2.AsyncClient, proxy: str) -> None:
    _title("3. A search over the FAQ by embeddings")
    entries = load_faq(ROOT / "docs" / "faq.md")
    answers = await _embed(client, proxy, [f"passage: {entry.answer}" for entry in entries])
    for query, vector in zip(SEARCHES, await _embed(client, proxy, [f"query: {q}" for q in SEARCHES]), strict=True):
        scores = [sum(a * b for a, b in zip(vector, answer, strict=True)) for answer in answers]
        best = max(range(len(scores)), key=scores.__getitem__)
        print(f"  {query!r}\n    -> {entries[best].question}  (similarity {scores[best]:.2f})")


async def _embed(client: httpx2.AsyncClient, proxy: str, texts: list[str]) -> list[list[float]]:
    answer = await client.post(f"{proxy}/v1/embeddings", json={"model": "demo/e5", "input": texts})
    _expect(answer.status_code == 200, f"the embedding was answered {answer.status_code}")
    return [item["embedding"] for item in answer.json()["data"]]


async def _tamper(client: httpx2.AsyncClient, relay: Relay, proxy: str) -> None:
    _title("4. An attacker on the network flips one bit of an answer")
    relay.flip_at = 100
    body = {"model": "latest", "messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 20}
    answer = await client.post(f"{proxy}/v1/chat/completions", json=body)
    _expect(relay.flip_at is None, "the bit was not flipped")
    _expect(answer.status_code == 502, f"the changed answer got through with status {answer.status_code}")
    print(
        f"  the client refused it before a word was used:\n  {answer.status_code} {answer.json()['error']['message']}"
    )


def _show_network(relay: Relay, typed: list[str], public: bytes) -> None:
    _title("5. What the network saw")
    print(f"  you typed:  {typed[0]}\n  the request on the wire (first {8 * _WIDTH} bytes of its body):")
    start = relay.sent.index(b"message/ohttp-chunked-req")
    start = relay.sent.index(b"\r\n\r\n", start) + 4
    for at in range(start, start + 8 * _WIDTH, _WIDTH):
        row = bytes(relay.sent[at : at + _WIDTH])
        print(f"  {at - start:04x}  {row.hex(' ')}  {''.join(chr(c) if 32 <= c < 127 else '.' for c in row)}")
    recorded = bytes(relay.sent + relay.answered).lower()
    words = {word.strip(".,?;:()").lower() for text in typed for word in text.split()}
    # Short words occur in random bytes by chance, and some words are in the evidence, which is public.
    public = public.lower() + b"/.well-known/attestation"
    words = {word for word in words if len(word) >= 6 and word.encode() not in public}
    found = sorted(word for word in words if word.encode() in recorded)
    _expect(not found, f"the network saw {found}")
    print(
        f"  {len(recorded):,} bytes recorded both ways; none of the conversation's {len(words)} longer words is there"
    )


def _title(text: str) -> None:
    print(f"\n{text}", flush=True)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(f"the demo failed: {otherwise}")

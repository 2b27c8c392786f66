"""Lists of callers and their limits, on clocks that the test moves; and through a gateway."""

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from adytum.attestation.core.ed25519 import small_order
from adytum.inference.__main__ import main
from adytum.inference.channel.bhttp import field
from adytum.inference.core.config import ConfigError, parse
from adytum.inference.gateway.callers.callers import SIGNED, Caller, CallerList, Callers, CallersError
from adytum.inference.gateway.failures import Refused
from tests.support import Answer, config_text, sealed_chat
from tests.unit.gateway.support import RunningGateway, running_gateway

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNED_BY = KEY.public_key().public_bytes_raw()


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def listed(serial: int, *entries: str) -> str:
    return f"serial = {serial}\n" + "".join(f"[[caller]]\n{entry}\n" for entry in entries)


def entry(name: str, key: str, more: str = "") -> str:
    return f'name = "{name}"\nkey_sha256 = "{digest(key)}"\n{more}'


def put(path: Path, text: str, key: Ed25519PrivateKey = KEY) -> None:
    path.write_text(text)
    path.with_name(path.name + ".sig").write_text(key.sign(SIGNED + text.encode()).hex() + "\n")


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def callers(clock: Clock, **limits: Any) -> tuple[Callers, Caller]:
    caller = Caller(name="a", key_sha256=digest("ka"), **limits)
    return Callers((caller,), clock=clock, monotonic=clock), caller


def refused(call: Any, *arguments: Any) -> tuple[int, int | None]:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.refusal.status, caught.value.refusal.retry_after_s


def test_requests_per_minute_come_back_with_time_and_not_more_than_a_minutes_worth() -> None:
    clock = Clock()
    held, caller = callers(clock, requests_per_minute=6)
    for _ in range(6):
        held.begin(caller).end()
    assert refused(held.begin, caller) == (429, 10)
    clock.now += 10
    held.begin(caller).end()
    assert refused(held.begin, caller) == (429, 10)
    clock.now += 3600
    for _ in range(6):
        held.begin(caller).end()
    assert refused(held.begin, caller) == (429, 10)


def test_tokens_are_reserved_and_what_was_not_used_comes_back() -> None:
    clock = Clock()
    held, caller = callers(clock, tokens_per_minute=1000)
    first = held.begin(caller)
    held.reserve(first, 800)
    second = held.begin(caller)
    assert refused(held.reserve, second, 500) == (429, 18)
    second.end()
    first.used = 100
    first.end()
    first.end()
    third = held.begin(caller)
    held.reserve(third, 900)
    assert refused(held.reserve, held.begin(caller), 1) == (429, 1)


def test_a_request_larger_than_a_minutes_worth_goes_when_the_bucket_is_full_and_is_paid_for_after() -> None:
    clock = Clock()
    held, caller = callers(clock, tokens_per_minute=600)
    hold = held.begin(caller)
    held.reserve(hold, 6000)
    hold.used = 1200
    hold.end()
    assert refused(held.reserve, held.begin(caller), 1) == (429, 61)
    clock.now += 61
    held.reserve(held.begin(caller), 1)


def test_requests_at_a_time() -> None:
    held, caller = callers(Clock(), concurrent=2)
    first = held.begin(caller)
    held.begin(caller)
    assert refused(held.begin, caller)[0] == 429
    first.end()
    held.begin(caller)


def test_an_expired_key_is_an_unknown_one() -> None:
    clock = Clock()
    held, _ = callers(clock, expires="2027-01-15T08:00:01Z")
    fields = ((b"authorization", b"Bearer ka"),)
    assert held.authenticate(fields)[0].name == "a"
    clock.now += 1
    assert refused(held.authenticate, fields) == (401, None)
    assert refused(held.authenticate, ((b"authorization", b"Bearer kb"),)) == (401, None)
    assert refused(held.authenticate, ()) == (401, None)


def test_a_new_list_is_no_new_minute_and_revokes_at_once() -> None:
    clock = Clock()
    held, caller = callers(clock, requests_per_minute=1)
    held.begin(caller).end()
    held.replace(CallerList.parse(listed(1, entry("a", "ka", "requests_per_minute = 1")).encode()))
    assert refused(held.begin, caller)[0] == 429
    held.replace(CallerList.parse(listed(2, entry("b", "kb")).encode()))
    assert refused(held.authenticate, ((b"x-api-key", b"ka"),)) == (401, None)
    assert refused(held.begin, caller) == (401, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("serial = 1", "caller"),
        (listed(1, entry("a", "k"), entry("a", "l")), "same name"),
        (listed(1, entry("a", "k"), entry("b", "k")), "same key_sha256"),
        (listed(1, entry("a", "k", "requests = 1")), "requests"),
        (listed(1, entry("A", "k")), "name"),
        (listed(1, entry("a", "k", "models = []")), "models"),
        (listed(1, entry("a", "k", "concurrent = 0")), "concurrent"),
        (listed(1, entry("a", "k", "expires = 2027-01-01T00:00:00")), "expires"),
        (listed(-1, entry("a", "k")), "serial"),
        ("serial = ", "TOML"),
        (listed(1, entry("anyone", "k")), "no key was asked for"),
    ],
)
def test_a_list_that_says_anything_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(CallersError, match=says):
        CallerList.parse(text.encode())


def test_the_error_does_not_show_a_key_where_a_hash_belongs() -> None:
    with pytest.raises(CallersError) as caught:
        CallerList.parse(b'serial = 1\n[[caller]]\nname = "a"\nkey_sha256 = "ck-secret-of-somebody"\n')
    assert "secret" not in str(caught.value)


def test_only_the_configured_key_signs(tmp_path: Path) -> None:
    path = tmp_path / "callers.toml"
    put(path, listed(1, entry("a", "k")))
    assert CallerList.load(path, SIGNED_BY).serial == 1
    put(path, listed(1, entry("a", "k")), Ed25519PrivateKey.generate())
    with pytest.raises(CallersError, match="not signed"):
        CallerList.load(path, SIGNED_BY)
    put(path, listed(1, entry("a", "k")))
    path.write_text(listed(1, entry("b", "k")))
    with pytest.raises(CallersError, match="not signed"):
        CallerList.load(path, SIGNED_BY)
    path.with_name("callers.toml.sig").unlink()
    with pytest.raises(CallersError, match="cannot be read"):
        CallerList.load(path, SIGNED_BY)


def test_a_key_of_small_order_is_refused_since_anybody_signs_for_it(tmp_path: Path) -> None:
    of_order_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
    for y in (0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18, int.from_bytes(bytes.fromhex(of_order_8), "little")):
        for sign in (0, 1 << 255):
            assert small_order((y | sign).to_bytes(32, "little"))
    assert not any(small_order(Ed25519PrivateKey.generate().public_key().public_bytes_raw()) for _ in range(100))
    changes = {"authentication": f'"file"\nfile = "x"\nsigned_by = "{"0" * 64}"'}
    with pytest.raises(ConfigError, match="anyone can sign"):
        parse(config_text(port=0, runtime=tmp_path, changes=changes).encode())


def test_another_list_with_the_same_serial_is_refused_and_the_same_one_is_no_change() -> None:
    held, _ = callers(Clock())
    first = CallerList.parse(listed(5, entry("a", "ka")).encode())
    held.replace(first)
    held.replace(first)
    with pytest.raises(CallersError, match="another list"):
        held.replace(CallerList.parse(listed(5, entry("a", "ka"), entry("b", "kb")).encode()))


def test_an_empty_list_lets_nobody_in() -> None:
    held, _ = callers(Clock())
    held.replace(CallerList.parse(b"serial = 1\ncaller = []"))
    assert refused(held.authenticate, ((b"x-api-key", b"ka"),)) == (401, None)


def test_new_limits_give_no_new_minute_and_forget_no_request_in_progress() -> None:
    held, caller = callers(Clock(), requests_per_minute=2, concurrent=1)
    held.begin(caller)
    held.replace(CallerList.parse(listed(1, entry("a", "ka", "requests_per_minute = 3\nconcurrent = 1")).encode()))
    caller = held.authenticate(((b"x-api-key", b"ka"),))[0]
    assert refused(held.begin, caller)[0] == 429, "one at a time still"
    held.replace(CallerList.parse(listed(2, entry("a", "ka", "requests_per_minute = 3")).encode()))
    caller = held.authenticate(((b"x-api-key", b"ka"),))[0]
    held.begin(caller)
    assert refused(held.begin, caller)[0] == 429, "the first one counts"


def test_a_clock_that_goes_back_revives_no_key() -> None:
    clock = Clock()
    held, _ = callers(clock, expires="2027-01-15T08:00:01Z")
    clock.now += 1
    assert refused(held.authenticate, ((b"x-api-key", b"ka"),)) == (401, None)
    clock.now -= 100
    assert refused(held.authenticate, ((b"x-api-key", b"ka"),)) == (401, None)


def test_a_pipe_in_the_files_place_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "callers.toml"
    put(path, listed(1, entry("a", "k")))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CallersError, match="cannot be read"):
        CallerList.load(path, SIGNED_BY)


# Through a gateway.


@pytest.fixture
def gateway(tmp_path: Path) -> Any:
    path = tmp_path / "callers.toml"
    limited = 'requests_per_minute = 3\nconcurrent = 1\nmodels = ["demo/llama-awq"]'
    put(path, listed(5, entry("open", "ko"), entry("limited", "kl", limited)))
    text = config_text(
        port=0,
        runtime=tmp_path,
        changes={"authentication": f'"file"\nfile = "{path}"\nsigned_by = "{SIGNED_BY.hex()}"'},
    )
    with running_gateway(parse(text.encode()), tmp_path) as running:
        yield running


def ask(gateway: RunningGateway, key: str, model: str = "demo/llama-awq", **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
    return sealed_chat(gateway, body, fields=((b"authorization", b"Bearer " + key.encode()),))


def test_each_key_has_its_limits_and_models_inside_the_seal(gateway: RunningGateway) -> None:
    other = ask(gateway, "kl", "demo/gemma3")
    assert (other.status, other.json()["error"]["code"]) == (404, "model_not_found")
    assert "demo/gemma3" not in other.json()["error"]["message"]
    models = sealed_chat(gateway, b"", path="/v1/models", method="GET", fields=((b"x-api-key", b"kl"),)).json()
    assert {item["id"] for item in models["data"]} == {"demo/llama-awq", "latest"}
    assert [ask(gateway, "kl").status for _ in range(2)] == [200, 200]
    seen = len(gateway.engine.seen)
    limited = ask(gateway, "kl")
    assert (limited.status, limited.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(field(limited.fields, b"retry-after") or 0) <= 20
    assert len(gateway.engine.seen) == seen, "no engine was touched"
    assert ask(gateway, "ko", "demo/gemma3").status == 200


@pytest.mark.slow
def test_a_revoked_key_ends_no_answer_and_begins_none(gateway: RunningGateway, tmp_path: Path) -> None:
    streamed: list[Answer] = []
    thread = threading.Thread(target=lambda: streamed.append(ask(gateway, "kl", stream=True, events=6, gap=0.3)))
    thread.start()
    time.sleep(0.6)
    assert ask(gateway, "kl").status == 429, "one at a time"
    put(tmp_path / "callers.toml", listed(6, entry("open", "ko"), entry("new", "kn")))
    gateway.reread()
    assert ask(gateway, "kl").status == 401
    assert ask(gateway, "kn").status == 200
    thread.join()
    assert streamed[0].status == 200
    assert b"[DONE]" in streamed[0].content


def test_an_older_or_forged_list_changes_nothing(
    gateway: RunningGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "callers.toml"
    put(path, listed(4, entry("old", "k-old")))
    gateway.reread()
    assert "older than 5" in caplog.text
    put(path, listed(7, entry("evil", "k-evil")), Ed25519PrivateKey.generate())
    gateway.reread()
    assert "not signed" in caplog.text
    assert ask(gateway, "k-old").status == ask(gateway, "k-evil").status == 401
    assert ask(gateway, "ko").status == 200


def test_a_wrong_key_is_refused_before_its_json_is_read(gateway: RunningGateway) -> None:
    answer = sealed_chat(gateway, b"[" * 100_000, fields=((b"authorization", b"Bearer wrong"),))
    assert answer.status == 401


def test_the_commands_make_a_list_that_a_backend_takes(tmp_path: Path) -> None:
    run = CliRunner().invoke
    made = run(main, ["callers", "key"]).output.split()
    assert hashlib.sha256(made[4].encode()).hexdigest() in made[-1]
    signing = tmp_path / "signing.pem"
    said = run(main, ["callers", "signing-key", str(signing)]).output
    public = said.split('"')[1]
    assert signing.stat().st_mode & 0o777 == 0o600
    assert "exists, and is not overwritten" in run(main, ["callers", "signing-key", str(signing)]).output
    path = tmp_path / "list.toml"
    path.write_text(listed(3, entry("a", "k", "tokens_per_minute = 1000")))
    assert "serial 3, 1 callers" in run(main, ["callers", "sign", str(path), "--key", str(signing)]).output
    assert (
        "a: all models; 1,000 tokens per minute"
        in run(main, ["callers", "check", str(path), "--signed-by", public]).output
    )
    path.write_text("serial = 1")
    assert run(main, ["callers", "sign", str(path), "--key", str(signing)]).exit_code == 1

"""The configuration: what is refused, and how it is said."""

import hashlib
from pathlib import Path

import pytest

from adytum.inference.channel.padding import Padding
from adytum.inference.channel.shaping import Cells
from adytum.inference.core.config import ConfigError, load, parse
from tests.support import ROOT, config_text

DEMO = (ROOT / "deploy" / "config" / "demo.toml").read_bytes()


def changed(old: str, new: str) -> bytes:
    text = DEMO.decode()
    assert old in text, old
    return text.replace(old, new, 1).encode()


def test_the_shipped_demo_is_valid_and_its_digest_is_of_the_files_bytes() -> None:
    config = load(ROOT / "deploy" / "config" / "demo.toml")
    assert config.sha256 == hashlib.sha256(DEMO).digest()
    assert [model.id for model in config.models] == ["demo/llama-awq", "demo/gemma3", "demo/e5"]
    assert all(model.id.startswith("demo/") for model in config.models), "honest ids by default"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('padding = "pad"', 'paddding = "pad"', "channel.paddding: unknown name; did you mean padding?"),
        ('padding = "pad"', "", "channel.padding: missing"),
        ('padding = "pad"', 'padding = "none"', "channel.padding: "),
        ('padding = "pad"', 'padding = "constant"', "needs cadence_ms, chunk_bytes and least_chunks"),
        ('padding = "pad"', 'padding = "constant"\ncadence_ms = 20\nchunk_bytes = 1024', "needs cadence_ms"),
        ('padding = "pad"', 'padding = "pad"\ncadence_ms = 20', "only it has them"),
        ('padding = "pad"', 'padding = "constant"\nchunk_bytes = 255', "channel.chunk_bytes: "),
        ('padding = "pad"', 'padding = "constant"\nchunk_bytes = 16385', "channel.chunk_bytes: "),
        ('padding = "pad"', 'padding = "constant"\ncadence_ms = 0', "channel.cadence_ms: "),
        ('padding = "pad"', 'padding = "constant"\nleast_chunks = 0', "channel.least_chunks: "),
        ('authentication = "none"', "", "callers.authentication: missing"),
        ('authentication = "none"', 'authentication = "keys"', "needs at least one key_sha256"),
        ('authentication = "none"', 'authentication = "keys"\nkey_sha256 = ["abc"]', "callers.key_sha256"),
        ('host = "127.0.0.1"', 'host = "0.0.0.0"', "without TLS the backend listens on loopback only"),
        ('mode = "off"', 'mode = "files"', "needs certificate and key"),
        ('mode = "off"', 'mode = "generated"', "needs names"),
        ('cpu = "simulated"', 'cpu = "sgx"', "evidence.cpu: "),
        ('aliases = ["latest"]', 'aliases = ["demo/e5"]', "given more than once"),
        ("[engines]", "[engine]", "engine: unknown name; did you mean engines?"),
        ('task = "embed"', 'tsak = "embed"', "models.2.tsak: unknown name; did you mean task?"),
        ("port = 8080", 'port = "8080x"', "server.port: "),
        ("[server]", "[server", "is not TOML"),
        ("[server]", 'sha256 = "00"\n[server]', "sha256 is computed"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place_and_what_to_do(old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(changed(old, new))
    assert said in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.toml")


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="models"):
        parse(DEMO[: DEMO.index(b"[[models]]")])


def test_the_tests_own_helper_changes_what_it_says(tmp_path: Path) -> None:
    config = parse(config_text(port=1234, runtime=tmp_path, api_keys=["a", "b"]).encode())
    assert (config.server.port, config.engines.runtime_directory) == (1234, tmp_path)
    assert config.callers.key_sha256 == {hashlib.sha256(key).hexdigest() for key in (b"a", b"b")}


def test_constant_answers_have_their_cells() -> None:
    three = 'padding = "constant"\ncadence_ms = 20\nchunk_bytes = 1024\nleast_chunks = 32'
    assert parse(changed('padding = "pad"', three)).channel.shape == Cells(1024, 32, 0.02)
    assert parse(DEMO).channel.shape is Padding.PAD

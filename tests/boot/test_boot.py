"""The image boots, serves who verifies it, and stops where a disk is not what the command line says.

`make boot-test` runs this after `make image`. QEMU emulates the processor, so it takes its time, and has no SEV-SNP:
the evidence is simulated, and what this shows is the way from a command line to an answer.
"""

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.boot.machine import (
    FIRMWARE,
    IMAGE,
    attested,
    command_line,
    data_size,
    flipped,
    models,
    running,
    serving,
    tell,
)
from tests.system.client.test_sdks import FAQ

if os.environ.get("ADYTUM_BOOT_TEST") != "1":
    pytest.skip("boots virtual machines: make boot-test", allow_module_level=True)
if shutil.which("qemu-system-x86_64") is None:
    pytest.skip("QEMU is missing: apt-get install qemu-system-x86", allow_module_level=True)
if not (IMAGE / "root.img").exists():
    pytest.fail(f"there is no image in {IMAGE}: make image", pytrace=False)

SERVING = 3000.0
"""Seconds, emulated."""
INIT = 180.0


@pytest.mark.timeout(4 * SERVING)
def test_it_boots_and_answers_who_verified_it(tmp_path: Path) -> None:
    with running(tmp_path) as machine:
        tell(f"\nthe root and the models are open after {machine.until('e5 is open', INIT):.0f} s")
        url, certificate, context = serving(machine, tmp_path, SERVING)
        transport = attested(url, certificate, context, tmp_path)
        http = openai.DefaultHttpxClient(transport=transport)
        with openai.OpenAI(api_key="none", base_url=f"{url}/v1", http_client=http, timeout=900) as client:
            began = time.monotonic()
            answer = client.chat.completions.create(
                model="demo/gemma3",
                messages=[{"role": "user", "content": FAQ[0].question}],
                max_tokens=100,
                temperature=0,
            )
            said = (answer.choices[0].message.content or "").strip()
            tell(f"demo/gemma3 after {time.monotonic() - began:.1f} s: {said}")
            assert said == FAQ[0].answer
            embedding = client.embeddings.create(model="demo/e5", input="query: a").data[0].embedding
            assert sum(x * x for x in embedding) == pytest.approx(1, abs=1e-3)
            tell("an embedding of length 1")
        evidence = transport.verify().evidence
        assert {model.id for model in evidence.claims.models} == {"demo/llama-awq", "demo/gemma3", "demo/e5"}
        with urllib.request.urlopen(f"{url}/readyz", timeout=60, context=context) as page:
            found = json.load(page)["models"]
        tell(f"models: {found}")
        assert found["demo/gemma3"] == found["demo/e5"] == "live"
        # Its kernels for AWQ do not run on the processor that QEMU emulates. The canary sees it, and closes it alone.
        assert found["demo/llama-awq"] in ("live", "failed")
        console = machine.said()
        # Nobody can log in, and what was said stays inside.
        assert "login:" not in console
        assert FAQ[0].question not in console
        assert FAQ[0].answer not in console
        assert "failed" not in re.sub(r"(?m)^\[.*\]", "", console).lower(), console[-3000:]


@pytest.mark.timeout(4 * INIT)
def test_the_firmware_starts_the_one_efi_program(tmp_path: Path) -> None:
    """The same kernel, initrd and command line from one file, which measured boot has as one event."""
    if not FIRMWARE.exists():
        pytest.skip(f"{FIRMWARE} is missing: apt-get install ovmf")
    with running(tmp_path, efi=True, memory=4096) as machine:
        tell(f"\nfrom the EFI program, open after {machine.until('e5 is open', 2 * INIT):.0f} s")


@pytest.mark.timeout(4 * INIT)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_changed_bit_of_the_root_stops_it(tmp_path: Path, place: str) -> None:
    size = int(re.findall(r"adytum\.root=[0-9a-f]{64}:(\d+)", command_line())[0])
    image = flipped(IMAGE / "root.img", tmp_path / "root.img", 40 if place == "first" else size - 4096)
    with running(tmp_path, disks={"root": image, **models()}, memory=2048) as machine:
        said = machine.ends(INIT)
    assert "root is open" not in said
    assert re.search(r"dm-verity.*corrupt", said), said[-2000:]
    assert "Kernel panic" in said
    tell("\n" + next(line for line in said.splitlines() if "Kernel panic" in line))


@pytest.mark.timeout(SERVING)
def test_a_changed_bit_of_the_weights_stops_it(tmp_path: Path) -> None:
    """In the middle of the tensors: found when the backend reads them, before an engine starts."""
    image = flipped(models()["gemma"], tmp_path / "gemma.img", data_size("gemma") // 2)
    with running(tmp_path, disks={"root": IMAGE / "root.img", **models(), "gemma": image}) as machine:
        machine.until("gemma is open", INIT)
        said = machine.ends(SERVING)
    assert re.search(r"dm-verity.*corrupt", said), said[-2000:]
    assert "Kernel panic" in said
    assert "SERVING" not in said


@pytest.mark.timeout(4 * INIT)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: re.sub(r"(adytum\.root=)[0-9a-f]{4}", r"\g<1>0000", line), "dm-verity device corrupted"),
        (lambda line: re.sub(r"adytum\.root=\S+", "", line), "no adytum.root="),
        (lambda line: re.sub(r"(adytum\.model=llama:)[0-9a-f]{4}", r"\g<1>0000", line), "dm-verity device corrupted"),
        (lambda line: re.sub(r"(adytum\.root=[0-9a-f]{64}):\d+", r"\g<1>:4096", line), "does not match root hash"),
        (lambda line: line.replace("adytum.model=e5:", "adytum.model=e6:"), 'no disk with serial number "e6"'),
    ],
    ids=["root hash", "no root", "model's hash", "no tree there", "missing disk"],
)
def test_a_command_line_that_does_not_fit_stops_it(tmp_path: Path, change: Callable[[str], str], said: str) -> None:
    with running(tmp_path, append=change(command_line()), memory=2048) as machine:
        console = machine.ends(INIT)
    assert said in console, console[-2000:]
    assert "switch_root" not in console

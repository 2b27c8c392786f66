"""Who may ask comes on a disk, and changes while the machine runs.

deploy/image/build.sh cpu tests/boot/callers.toml build/image-callers e5=...
ADYTUM_BOOT_TEST=1 ADYTUM_CALLERS_IMAGE=build/image-callers pytest -s tests/boot/test_callers.py
"""

import os
import shutil
import time
from pathlib import Path

import openai
import pytest

from tests.boot.machine import attested, running, serving, tell
from tests.unit.gateway.callers.test_callers import entry, listed
from tests.unit.gateway.callers.test_disk import written

IMAGE = Path(os.environ.get("ADYTUM_CALLERS_IMAGE", ""))

if os.environ.get("ADYTUM_BOOT_TEST") != "1" or not os.environ.get("ADYTUM_CALLERS_IMAGE"):
    pytest.skip("boots a virtual machine of an image of its own: ADYTUM_CALLERS_IMAGE", allow_module_level=True)
if shutil.which("qemu-system-x86_64") is None:
    pytest.skip("QEMU is missing: apt-get install qemu-system-x86", allow_module_level=True)

SERVING = 3000.0
SEEN = 120.0
"""Seconds until a changed list counts; two of them are the backend's pause, the rest is emulation."""


@pytest.mark.timeout(2 * SERVING)
def test_a_changed_list_counts_while_the_machine_runs(tmp_path: Path) -> None:
    disk = written(tmp_path, listed(1, entry("a", "ka")))
    disks = {"root": IMAGE / "root.img", "e5": IMAGE / "e5.img", "callers": disk}
    with running(tmp_path, disks=disks, image=IMAGE, memory=6144) as machine:
        transport = attested(*serving(machine, tmp_path, SERVING), tmp_path)
        http = openai.DefaultHttpxClient(transport=transport)
        client = openai.OpenAI(
            api_key="none", base_url=f"https://localhost:{machine.port}/v1", http_client=http, timeout=900
        )

        def taken(key: str) -> bool:
            asked = client.with_options(api_key=key, max_retries=0)
            try:
                found = asked.embeddings.create(model="demo/e5", input="query: a")
            except openai.AuthenticationError:
                return False
            return bool(found.data[0].embedding)

        assert taken("ka")
        assert not taken("kb")
        written(tmp_path, listed(2, entry("b", "kb")))
        began = time.monotonic()
        while not taken("kb"):
            assert time.monotonic() - began < SEEN, machine.said()[-2000:]
        tell(f"a new list counts after {time.monotonic() - began:.1f} s")
        assert not taken("ka")
        # An older one does not.
        written(tmp_path, listed(1, entry("a", "ka")))
        machine.until("is older than 2", SERVING)
        assert taken("kb")
        assert not taken("ka")

"""dm-verity: the format against veritysetup, images that repeat byte for byte, and what a folder is said to lie on.

The mount tables, sysfs entries and device-mapper tables below were recorded in a virtual machine (Debian's 6.1 kernel)
with the demo's embedding model on a dm-verity image made by `deploy/weights/image.py`.
"""

import dataclasses
import hashlib
import io
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from adytum.deploy.weights import erofs
from adytum.deploy.weights.image import build, canary_path, main, manifest_path, measure
from adytum.inference.engine.supervise.canary import Answers, Golden
from adytum.inference.engine.weights.storage import Storage, StorageError, Target, read_table, where
from adytum.inference.engine.weights.verity import SUPERBLOCK_SIZE, Superblock, Verity, VerityError, root_hash
from adytum.inference.engine.weights.weights import CANARY, NAME, Manifest, Source, WeightsError, check, lock

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
VERITYSETUP = shutil.which("veritysetup", path=PATH)
FSCK = shutil.which("fsck.erofs", path=PATH)
with_veritysetup = pytest.mark.skipif(VERITYSETUP is None, reason="veritysetup is missing (cryptsetup-bin)")

ROOT_HASH = "63b41ed8e3ef6de93c551ab21bfbfb8100f0c05a66a6f4e16f565e63667edeaf"
SALT = "009c6281ca726fb4ec76032b078a4de5680b3f5a2fdb3ca1c37a13cb04947591"
LINE = f"1 254:0 254:0 4096 4096 708 709 sha256 {ROOT_HASH} {SALT}"
MOUNTS = """\
25 1 0:22 / / ro,relatime - 9p host ro,dirsync,loose,access=client,msize=512000,trans=virtio
26 25 0:23 / /proc rw,relatime - proc proc rw
27 25 0:21 / /sys rw,relatime - sysfs sys rw
28 25 0:5 / /dev rw,relatime - devtmpfs dev rw,size=1998112k,nr_inodes=499528,mode=755,inode64
29 25 0:24 / /mnt rw,relatime - tmpfs tmpfs rw,inode64
30 25 0:25 / /run rw,relatime - tmpfs tmpfs rw,inode64
31 29 253:0 / /mnt/w ro,nosuid,nodev,noexec,relatime - erofs /dev/mapper/weights ro,user_xattr,acl
"""
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


class Machine:
    """Recorded proc and sys as files, and device-mapper tables."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: dict[tuple[int, int], tuple[Target, ...]] = {(253, 0): (Target("verity", LINE, "V"),)}
        self.mounts(MOUNTS)
        (root / "proc/swaps").write_text(SWAPS)
        self.device("254:0", None)
        self.device("253:0", "CRYPT-VERITY-fd523a593b77b662436f99a58e052d8d-weights", "254:0")

    def mounts(self, text: str) -> None:
        (self.root / "proc/self").mkdir(parents=True, exist_ok=True)
        (self.root / "proc/self/mountinfo").write_text(text)

    def device(self, number: str, uuid: str | None, *slaves: str) -> None:
        device = self.root / "sys/dev/block" / number
        device.mkdir(parents=True)
        (device / "dev").write_text(f"{number}\n")
        if uuid is not None:
            (device / "dm").mkdir()
            (device / "dm/uuid").write_text(f"{uuid}\n")
            (device / "slaves").mkdir()
            for slave in slaves:
                (device / "slaves" / slave.replace(":", "-")).symlink_to(device.parent / slave)

    def table(self, major: int, minor: int) -> tuple[Target, ...]:
        return self.tables[major, minor]

    def where(self, folder: str = "/mnt/w") -> Storage:
        return where(Path(folder), self.root, self.table)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_verity_device_is_told_with_its_root_hash(machine: Machine) -> None:
    for folder in ("/mnt/w", "/mnt/w/1_Pooling"):
        found = machine.where(folder)
        assert (found.kind, found.root_hash, found.protected) == ("verity", ROOT_HASH, True)
    place = f"on dm-verity (erofs on /dev/mapper/weights, root hash {ROOT_HASH})"
    assert machine.where().says() == f"the folder is {place}: the kernel checks every read."


def test_ordinary_disk_and_memory(machine: Machine) -> None:
    disk = machine.where("/work/models")
    assert not disk.protected
    assert disk.says() == (
        "the folder is on an ordinary disk (9p on host): the host could change it after the check. "
        "Use the verity image (docs/explanation/weights.md) or memory."
    )
    memory = machine.where("/run/models")
    assert (memory.kind, memory.protected) == ("memory", True)
    assert memory.says() == "the folder is in memory (tmpfs): what is checked is what the engine reads."


def test_memory_that_may_be_swapped_is_the_hosts(machine: Machine) -> None:
    (machine.root / "proc/swaps").write_text(SWAPS + "/dev/vdb partition\t1048572\t0\t-2\n")
    found = machine.where("/run/models")
    assert not found.protected
    assert "in memory that may be swapped to /dev/vdb (tmpfs on tmpfs): the host could change it" in found.says()
    machine.mounts(MOUNTS.replace("tmpfs rw,inode64", "tmpfs rw,inode64,noswap"))
    assert machine.where("/run/models").protected


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ((Target("verity", LINE + " 1 ignore_corruption", "V"),), "on dm-verity that reads corrupt blocks"),
        ((Target("verity", LINE + " 1 check_at_most_once", "V"),), "checks a block the first time only"),
        ((Target("verity", LINE + " 2 panic_on_corruption ignore_corruption", "V"),), "reads corrupt blocks"),
        ((Target("verity", LINE, "C"),), "has met a corrupt block"),
        ((Target("linear", "254:0 0", ""),), "on an ordinary disk"),
        ((Target("verity", LINE, "V"), Target("linear", "254:0 5664", "")), "on an ordinary disk"),
        ((), "on an ordinary disk"),
        ((Target("verity", "1 254:0", "V"),), "its root hash is unknown"),
    ],
)
def test_table_decides_not_the_name(machine: Machine, targets: tuple[Target, ...], reason: str) -> None:
    machine.tables[253, 0] = targets
    found = machine.where()
    assert not found.protected
    assert reason in found.says()


def test_options_that_do_not_weaken(machine: Machine) -> None:
    machine.tables[253, 0] = (Target("verity", LINE + " 2 restart_on_corruption ignore_zero_blocks", "V"),)
    assert machine.where().protected


def test_kernel_that_does_not_tell(machine: Machine) -> None:
    def refuse(major: int, minor: int) -> tuple[Target, ...]:
        raise StorageError("/dev/mapper/control: it needs CAP_SYS_ADMIN")

    found = where(Path("/mnt/w"), machine.root, refuse)
    assert not found.protected
    assert "its root hash is unknown (/dev/mapper/control: it needs CAP_SYS_ADMIN)" in found.says()


def test_a_device_that_may_not_be_looked_at_is_not_called_verity(machine: Machine) -> None:
    """As in a container, whose user may not read /sys."""

    def refuse(major: int, minor: int) -> tuple[Target, ...]:
        raise PermissionError(13, "Permission denied")

    found = where(Path("/mnt/w"), machine.root, refuse)
    assert not found.protected
    assert "on a device that this process may not look at" in found.says()
    assert "on dm-verity" not in found.says()


def test_stacked_devices(machine: Machine) -> None:
    """A linear device over verity is verity; a snapshot over it has a second, writable device below."""
    machine.device("253:1", "", "253:0")
    machine.device("253:2", "", "253:0", "254:0")
    machine.device("253:3", "")
    for number, kind in (("253:1", "verity"), ("253:2", "other"), ("253:3", "other"), ("254:0", "other")):
        machine.mounts(MOUNTS.replace("253:0", number))
        assert machine.where().kind == kind, number
    machine.device("253:4", "CRYPT-VERITY-00-other", "254:0")
    machine.device("253:5", "", "253:0", "253:4")
    machine.tables[253, 4] = (Target("verity", LINE.replace("63b4", "0000"), "V"),)
    machine.mounts(MOUNTS.replace("253:0", "253:5"))
    assert machine.where().kind == "other"


def test_mounts_that_hide_others(machine: Machine) -> None:
    """Recorded: a tmpfs over the image, then one inside it."""
    over = MOUNTS + "32 31 0:26 / /mnt/w rw,relatime - tmpfs tmpfs rw,inode64\n"
    machine.mounts(over)
    assert machine.where().kind == "memory"
    machine.mounts(over + "33 32 0:27 / /mnt/w/x rw,relatime - tmpfs t2 rw,inode64\n")
    assert machine.where().reason == "crossed by another mount (x)"
    # The parent's place is taken by a later mount, under which the image is no longer reached.
    machine.mounts(MOUNTS + "32 29 254:0 / /mnt rw,relatime - ext4 /dev/vda rw\n")
    assert machine.where().device == "/dev/vda"


def test_mount_points_with_spaces(machine: Machine) -> None:
    machine.mounts(MOUNTS.replace("/mnt/w ", "/mnt/my\\040weights\\134 "))
    assert machine.where("/mnt/my weights\\").kind == "verity"


def test_initramfs_is_its_own_parent(machine: Machine) -> None:
    machine.mounts("1 1 0:2 / / rw - rootfs rootfs rw\n" + MOUNTS.replace(" / / ro", " / /host ro"))
    assert machine.where("/models").kind == "memory"
    (machine.root / "proc/swaps").write_text(SWAPS + "/dev/vdb partition\t1048572\t0\t-2\n")
    assert machine.where("/models").kind == "other"


@pytest.mark.parametrize("text", ["", "garbage", "25 1 0:22 / / ro - 9p", "25 25 0:1 / / ro - ext4 /dev/vda rw"])
def test_mountinfo_that_makes_no_sense(machine: Machine, text: str) -> None:
    machine.mounts(text)
    assert not machine.where().protected


def test_this_machine(tmp_path: Path) -> None:
    """The real files: shared memory is memory here, or its swap is named; no device-mapper device has number 0:0."""
    shm = where(Path("/dev/shm"))
    assert shm.filesystem == "tmpfs"
    assert shm.kind == "memory" or "swapped" in shm.reason
    assert where(tmp_path).filesystem
    with pytest.raises(StorageError, match="/dev/mapper/control"):
        read_table(0, 0)


def test_check_wants_the_root_hash_that_the_manifest_names(machine: Machine, tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    manifest = lock(folder, verity=Verity(ROOT_HASH, SALT, 4096, 4096, 2899968))
    assert check(folder, manifest, storage=lambda _: machine.where()).root_hash == ROOT_HASH
    assert not check(folder, lock(folder), storage=lambda _: machine.where("/work")).protected
    for place in ("/work", "/run"):
        with pytest.raises(WeightsError, match=f"names the dm-verity root hash {ROOT_HASH}, but the folder is (on|in)"):
            check(folder, manifest, storage=lambda _, place=place: machine.where(place))
    machine.tables[253, 0] = (Target("verity", LINE.replace("63b4", "0000"), "V"),)
    with pytest.raises(WeightsError, match=r"but the folder is on dm-verity .*, root hash 0000"):
        check(folder, manifest, storage=lambda _: machine.where())


# veritysetup 2.6.1's root hashes of N blocks, block i being struct.pack("<I", i) * 1024, with the salt ab * 32.
ROOTS = {
    1: "dd2661f29736b994bb4d44940a72e328d0b56887df8761a1274e7d51cc525eed",
    2: "b4fd1f7c1561be5d0bbff9e285a3be46e902644a81684781696fffe16aeec2ab",
    128: "577360eba59adfa78b189ae51136d824e8efda6e2a1f38dc5b814873f4572e4c",
    129: "29b35d7cfeb173dcec77e5b26c63f65255ea24b25819a9940477b1d2a548737f",
    16385: "9b5ae11310a72ae22595112e74b060e964cb203f39e82d89c90380a5d73b642b",
}


def _blocks(count: int) -> bytes:
    return b"".join(struct.pack("<I", index) * 1024 for index in range(count))


@pytest.mark.parametrize("count", ROOTS)
def test_root_hash_is_veritysetups(count: int) -> None:
    superblock = Superblock(bytes(16), 4096, 4096, count, b"\xab" * 32)
    told: list[tuple[int, int]] = []
    digest = root_hash(io.BytesIO(_blocks(count)), superblock, lambda done, total: told.append((done, total)))
    assert digest.hex() == ROOTS[count]
    assert count == 1 or told[-1] == (count * 4096, count * 4096)


def test_root_hash_of_short_data() -> None:
    with pytest.raises(VerityError, match="shorter"):
        root_hash(io.BytesIO(_blocks(2)[:-1]), Superblock(bytes(16), 4096, 4096, 2, b""))


@with_veritysetup
@pytest.mark.parametrize(("count", "data_block", "hash_block"), [(3, 4096, 4096), (300, 1024, 4096), (300, 4096, 512)])
def test_against_veritysetup(tmp_path: Path, count: int, data_block: int, hash_block: int) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(count * data_block))
    size = -(-count * data_block // 4096) * 4096
    sizes = [f"--data-block-size={data_block}", f"--hash-block-size={hash_block}"]
    ended = subprocess.run(
        [VERITYSETUP, "format", image, image, f"--hash-offset={size}", "--salt=0102", f"--data-blocks={count}", *sizes],
        capture_output=True,
        text=True,
        check=True,
    )
    with image.open("rb") as stream:
        stream.seek(size)
        superblock = Superblock.parse(stream.read(SUPERBLOCK_SIZE))
        stream.seek(0)
        digest = root_hash(stream, superblock)
    assert (superblock.data_blocks, superblock.salt) == (count, b"\x01\x02")
    assert ended.stdout.split()[-1] == digest.hex()


SUPERBLOCK = struct.pack("<8sII16s32sIIQH6x256s168x", b"verity", 1, 1, b"u" * 16, b"sha256", 4096, 4096, 7, 2, b"\1\2")


def test_superblock() -> None:
    assert Superblock.parse(SUPERBLOCK + b"more") == Superblock(b"u" * 16, 4096, 4096, 7, b"\1\2")


@pytest.mark.parametrize("length", [0, 8, 511])
def test_truncated_superblock(length: int) -> None:
    with pytest.raises(VerityError, match="truncated"):
        Superblock.parse(SUPERBLOCK[:length])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, b"V"),
        (8, b"\2"),
        (12, b"\0"),
        (32, b"sha512"),
        (64, b"\1"),
        (68, b"\0\0"),
        (72, b"\0"),
        (79, b"\1"),
        (81, b"\2"),
    ],
)
def test_superblock_of_another_kind(place: int, value: bytes) -> None:
    with pytest.raises(VerityError):
        Superblock.parse(SUPERBLOCK[:place] + value + SUPERBLOCK[place + len(value) :])


@pytest.mark.parametrize(
    "change",
    [
        {"root_hash": ROOT_HASH.upper()},
        {"root_hash": ROOT_HASH[2:]},
        {"root_hash": 7},
        {"salt": "0"},
        {"salt": "00" * 257},
        {"algorithm": "sha1"},
        {"data_block_size": 4095},
        {"hash_block_size": 0},
        {"data_size": 4097},
        {"data_size": 0},
        {"data_size": "4096"},
        {"more": 1},
    ],
)
def test_description_of_another_kind(change: dict[str, object]) -> None:
    good = Verity(ROOT_HASH, SALT, 4096, 4096, 4096).to_json()
    assert Verity.from_json(good).to_json() == good
    with pytest.raises(VerityError):
        Verity.from_json({**good, **change})


@with_veritysetup
def test_same_weights_same_root_hash(tmp_path: Path) -> None:
    """Times, order of creation, modes and a link differ; the bytes do not."""
    first, second = _model(tmp_path / "first"), tmp_path / "second"
    (second / "1_Pooling").mkdir(parents=True)
    for path in sorted((p for p in first.rglob("*") if p.is_file()), reverse=True):
        copied = second / path.relative_to(first)
        shutil.copyfile(path, copied)
        copied.chmod(0o600)
        os.utime(copied, (1, 1))
    (second / "empty").unlink()
    (second / "empty").symlink_to("1_Pooling/nothing")
    one, two = build(first, tmp_path / "one.img"), build(second, tmp_path / "two.img")
    assert one == two
    assert (tmp_path / "one.img").read_bytes() == (tmp_path / "two.img").read_bytes()
    _flip(second / "model.safetensors", 12_345)
    three = build(second, tmp_path / "three.img")
    assert three.verity.root_hash != one.verity.root_hash
    assert three.root != one.root


@with_veritysetup
def test_image_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "model.img"
    made = CliRunner().invoke(main, ["make", str(_model(tmp_path / "model")), str(image)])
    assert made.exit_code == 0, made.output
    manifest = Manifest.load(manifest_path(image))
    assert manifest.root.hex() in made.output
    assert measure(image, manifest.verity.data_size) == manifest.verity
    command = [VERITYSETUP, "verify", image, image, manifest.verity.root_hash]
    command.append(f"--hash-offset={manifest.verity.data_size}")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert CliRunner().invoke(main, ["verify", str(image)]).exit_code == 0
    _flip(image, manifest.verity.data_size // 2)
    assert subprocess.run(command, capture_output=True).returncode != 0
    refused = CliRunner().invoke(main, ["verify", str(image)])
    assert (refused.exit_code, "the image is not the manifest's" in refused.output) == (1, True)


@with_veritysetup
def test_image_of_a_locked_folder(tmp_path: Path) -> None:
    """The folder's own manifest must hold, and gives the source."""
    folder = _model(tmp_path / "model")
    source = Source("hub/model", "0123456789abcdef0123456789abcdef01234567")
    lock(folder, source).save(folder / NAME)
    made = build(folder, tmp_path / "model.img")
    assert made.source == source
    assert NAME not in [file.path for file in made.files]
    _flip(folder / "model.safetensors", 0)
    with pytest.raises(WeightsError, match="not those of its adytum-manifest"):
        build(folder, tmp_path / "other.img")
    assert not (tmp_path / "other.img").exists()


@with_veritysetup
def test_golden_answers_go_with_the_image(tmp_path: Path) -> None:
    """They name a manifest's root, and the image's manifest has another than the folder's, for the same files."""
    folder, image = _model(tmp_path / "model"), tmp_path / "model.img"
    locked = lock(folder)
    locked.save(folder / NAME)
    asked = CliRunner().invoke(main, ["make", str(folder), str(image)])
    assert asked.exit_code == 0, asked.output
    assert not canary_path(image).exists(), "there are none"
    golden = Golden("embed", locked.root, "cpu", 0.001, Answers(embedding=(0.6, 0.8)))
    golden.save(folder / CANARY)
    asked = CliRunner().invoke(main, ["make", str(folder), str(image)])
    assert asked.exit_code == 0, asked.output
    root = Manifest.load(manifest_path(image)).root
    assert root != locked.root
    assert Golden.load(canary_path(image), root).answers == golden.answers
    dataclasses.replace(golden, weights_root=bytes(32)).save(folder / CANARY)
    asked = CliRunner().invoke(main, ["make", str(folder), str(image)])
    assert asked.exit_code == 1
    assert "belongs to other weights" in asked.output
    assert not canary_path(image).exists()


@pytest.mark.skipif(FSCK is None, reason="fsck.erofs is missing (erofs-utils)")
def test_erofs_reads_what_was_written(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    for index in range(400):  # A folder of several blocks.
        (folder / f"a file with a rather long name, number {index}").write_bytes(b"x" * (index * 41))
    files = sorted((p.relative_to(folder).as_posix(), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    image = tmp_path / "image"
    with image.open("wb") as out:
        size = erofs.write(out, files, lambda path, out: out.write((folder / path).read_bytes()), b"u" * 16)
    assert image.stat().st_size == size
    subprocess.run([FSCK, f"--extract={tmp_path / 'out'}", image], check=True, capture_output=True)
    assert lock(tmp_path / "out") == lock(folder)


def test_image_is_fixed_byte_for_byte() -> None:
    """A writer that writes anything else gives everybody's weights another root hash."""
    content = {"b/config.json": b"{}", "-first": b"x" * 5000, "b/a/nothing": b"", "a b": b"y" * 4096}
    images = []
    for paths in (sorted(content), sorted(content, reverse=True)):
        out = io.BytesIO()
        files = [(path, len(content[path])) for path in paths]
        assert erofs.write(out, files, lambda path, out: out.write(content[path]), b"u" * 16) == len(out.getvalue())
        images.append(hashlib.sha256(out.getvalue()).hexdigest())
    assert images == ["a377b1327c9a6e76436f73590c87990fd4b3f75a56a33e745afc9dda34d9716b"] * 2


def test_erofs_refuses(tmp_path: Path) -> None:
    for files in ([("a", 1), ("a/b", 1)], [("a", 1), ("a", 1)], [("n" * 256, 1)], [("a", 2)]):
        with pytest.raises(erofs.ImageError):
            erofs.write(io.BytesIO(), files, lambda _, out: out.write(b"x"), b"u" * 16)


def _model(folder: Path) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4_000)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}\n")
    (folder / "1_Pooling" / "nothing").touch()
    (folder / "empty").touch()
    return folder


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

"""The weights' manifest: what it accepts is exactly the folder that it was made of."""

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path

import pytest

from adytum.inference.engine.weights.progress import ProgressLine
from adytum.inference.engine.weights.verity import Verity
from adytum.inference.engine.weights.weights import (
    CANARY,
    NAME,
    Manifest,
    Source,
    WeightsError,
    WeightsFile,
    check,
    lock,
)

SOURCE = Source("intfloat/multilingual-e5-large-instruct", "0123456789abcdef0123456789abcdef01234567")
VERITY = Verity("5a" * 32, "c3" * 32, 4096, 4096, 8192)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40_000)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}\n")
    (folder / "empty").touch()
    return folder


def test_lock_lists_every_file_sorted(folder: Path) -> None:
    manifest = lock(folder)
    assert [file.path for file in manifest.files] == [
        "1_Pooling/config.json",
        "config.json",
        "empty",
        "model.safetensors",
    ]
    assert manifest.files[1] == WeightsFile("config.json", 2, hashlib.sha256(b"{}").hexdigest())
    assert manifest.size == 256 * 40_000 + 5
    check(folder, manifest)


def test_root_is_fixed_by_its_definition() -> None:
    """Another implementation must get the same: clients compare the root with one that they computed elsewhere."""
    entry = ["config.json", 2, hashlib.sha256(b"{}").hexdigest()]
    text = f'[["{entry[0]}",{entry[1]},"{entry[2]}"]]'
    assert Manifest((WeightsFile(*entry),)).root == hashlib.sha256(b"adytum weights v1\0" + text.encode()).digest()


def test_root_with_source_and_image_is_fixed_by_its_definition() -> None:
    files = Manifest((WeightsFile("config.json", 2, hashlib.sha256(b"{}").hexdigest()),)).root.hex()
    source = f'{{"repository":"{SOURCE.repository}","revision":"{SOURCE.revision}"}}'
    verity = (
        f'{{"algorithm":"sha256","data_block_size":4096,"data_size":8192,"hash_block_size":4096,'
        f'"root_hash":"{"5a" * 32}","salt":"{"c3" * 32}"}}'
    )
    for given, texts in (
        ((SOURCE, VERITY), (source, verity)),
        ((SOURCE, None), (source, "null")),
        ((None, VERITY), ("null", verity)),
    ):
        manifest = Manifest((WeightsFile("config.json", 2, hashlib.sha256(b"{}").hexdigest()),), *given)
        text = f'{{"files":"{files}","source":{texts[0]},"verity":{texts[1]}}}'
        assert manifest.root == hashlib.sha256(b"adytum weights v2\0" + text.encode()).digest()
        assert manifest.files_root.hex() == files


def test_manifest_of_before_keeps_its_root(tmp_path: Path) -> None:
    """A manifest in the first format, without source and image: clients that pinned its root keep it."""
    path = tmp_path / NAME
    digest = hashlib.sha256(b"{}").hexdigest()
    root = "5727a840c1baf7da7d88549e2f3014ebee02ab8054f1d2d741c996ec8c1a6856"
    files = [{"path": "config.json", "size": 2, "sha256": digest}]
    path.write_text(json.dumps({"format": "adytum weights v1", "root": root, "files": files}))
    manifest = Manifest.load(path)
    assert (manifest.root.hex(), manifest.source, manifest.verity) == (root, None, None)


@pytest.mark.parametrize("more", [(SOURCE, None), (None, VERITY), (SOURCE, VERITY)])
def test_source_and_image_are_kept(folder: Path, more: tuple[Source | None, Verity | None]) -> None:
    manifest = lock(folder, *more)
    manifest.save(folder / NAME)
    assert Manifest.load(folder / NAME) == manifest
    assert (manifest.source, manifest.verity) == more


def test_source_is_a_hub_id_and_a_commit() -> None:
    for repository, revision in (
        ("model", SOURCE.revision),
        ("a/b\n", SOURCE.revision),
        ("a/b/c", SOURCE.revision),
        ("/b", SOURCE.revision),
        ("a/b", "main"),
        ("a/b", SOURCE.revision.upper()),
        ("a/b", SOURCE.revision + "0"),
    ):
        with pytest.raises(WeightsError):
            Source(repository, revision)


def test_manifest_is_no_part_of_itself(folder: Path) -> None:
    manifest = lock(folder)
    manifest.save(folder / NAME)
    (folder / CANARY).write_text("{}")
    assert lock(folder) == manifest
    assert Manifest.load(folder / NAME) == manifest
    check(folder, manifest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: _flip(f / "model.safetensors", 5_000_000), "wrong content: model.safetensors"),
        (lambda f: (f / "config.json").write_text("[]"), "wrong content: config.json"),
        (lambda f: (f / "config.json").write_text("{ }"), "wrong size: config.json"),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), "missing file: 1_Pooling/config.json"),
        (lambda f: (f / "custom.py").touch(), "not in the manifest: custom.py"),
        (lambda f: (f / "1_Pooling" / NAME).touch(), f"not in the manifest: 1_Pooling/{NAME}"),
        (lambda f: (f / "1_Pooling" / CANARY).touch(), f"not in the manifest: 1_Pooling/{CANARY}"),
        (lambda f: (f / "empty").rename(f / "void"), "missing file: empty"),
    ],
)
def test_check_names_the_first_difference(folder: Path, change, reason: str) -> None:
    manifest = lock(folder)
    change(folder)
    with pytest.raises(WeightsError, match=reason):
        check(folder, manifest)


def test_every_field_moves_the_root(folder: Path) -> None:
    manifest = lock(folder)
    first, *others = manifest.files
    for changed in (
        dataclasses.replace(first, path="0"),
        dataclasses.replace(first, size=first.size + 1),
        dataclasses.replace(first, sha256="0" * 64),
    ):
        assert Manifest((changed, *others)).root != manifest.root
    roots = {manifest.root}
    whole = Manifest(manifest.files, SOURCE, VERITY)
    for changed in (
        whole,
        dataclasses.replace(whole, files=whole.files[1:]),
        dataclasses.replace(whole, source=None),
        dataclasses.replace(whole, verity=None),
        dataclasses.replace(whole, source=dataclasses.replace(SOURCE, repository="a/b")),
        dataclasses.replace(whole, source=dataclasses.replace(SOURCE, revision="0" * 40)),
        dataclasses.replace(whole, verity=dataclasses.replace(VERITY, root_hash="0" * 64)),
        dataclasses.replace(whole, verity=dataclasses.replace(VERITY, salt="")),
        dataclasses.replace(whole, verity=dataclasses.replace(VERITY, data_block_size=512)),
        dataclasses.replace(whole, verity=dataclasses.replace(VERITY, hash_block_size=512)),
        dataclasses.replace(whole, verity=dataclasses.replace(VERITY, data_size=4096)),
    ):
        assert changed.root not in roots
        roots.add(changed.root)


def test_links_stay_inside(folder: Path, tmp_path: Path) -> None:
    (folder / "alias").symlink_to("config.json")
    assert "alias" in [file.path for file in lock(folder).files]
    (folder / "alias").unlink()
    for target in (tmp_path / "secret", Path("/etc/passwd"), Path("../../x"), Path("loop")):
        (folder / "loop").symlink_to(target)
        with pytest.raises(WeightsError, match="leads out of the folder: loop"):
            lock(folder)
        (folder / "loop").unlink()
    (tmp_path / "outside").mkdir()
    (folder / "more").symlink_to(tmp_path / "outside")
    with pytest.raises(WeightsError, match="leads out of the folder: more"):
        lock(folder)


def test_link_to_a_folder_inside_is_refused(folder: Path) -> None:
    (folder / "again").symlink_to("1_Pooling")
    with pytest.raises(WeightsError, match="link to a folder: again"):
        lock(folder)


def test_empty_or_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="without files"):
        lock(tmp_path)
    with pytest.raises(WeightsError, match="not a folder"):
        lock(tmp_path / "none")


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("root"),
        lambda d: d.update(root="0" * 64),
        lambda d: d.update(format="other"),
        lambda d: d.update(more=1),
        lambda d: d.update(source={"repository": SOURCE.repository, "revision": SOURCE.revision}),
        lambda d: d.update(verity=None),
        lambda d: d.update(format="adytum weights v2"),
        lambda d: d["files"].reverse(),
        lambda d: d["files"].append(d["files"][-1]),
        lambda d: d["files"].clear(),
        lambda d: d["files"][0].update(path="../x"),
        lambda d: d["files"][0].update(path="/x"),
        lambda d: d["files"][0].update(size=-1),
        lambda d: d["files"][0].update(size=True),
        lambda d: d["files"][0].update(sha256="0"),
        lambda d: d["files"][0].update(more=1),
        lambda d: d["files"].__setitem__(0, 7),
        lambda d: d.update(files=None),
    ],
)
def test_load_refuses_edited_manifests(folder: Path, edit) -> None:
    path = folder / NAME
    lock(folder).save(path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(WeightsError):
        Manifest.load(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(format="adytum weights v1"),
        lambda d: d.pop("source"),
        lambda d: d.pop("verity"),
        lambda d: d.update(source=None),
        lambda d: d.update(source=[]),
        lambda d: d["source"].update(more=1),
        lambda d: d["source"].update(repository=7),
        lambda d: d["source"].update(revision=["0"] * 40),
        lambda d: d["source"].update(revision="0" * 40),
        lambda d: d.update(verity=[]),
        lambda d: d["verity"].update(root_hash="0" * 64),
        lambda d: d["verity"].update(data_size=True),
        lambda d: d["verity"].update(algorithm="sha1"),
        lambda d: d["verity"].pop("salt"),
    ],
)
def test_load_refuses_edited_sources_and_images(folder: Path, edit) -> None:
    path = folder / NAME
    lock(folder, SOURCE, VERITY).save(path)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(WeightsError):
        Manifest.load(path)


def test_progress_is_told_of_every_byte(folder: Path) -> None:
    (folder / "large").write_bytes(bytes(40_000_000))
    told: list[tuple[int, int]] = []
    manifest = lock(folder, progress=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {manifest.size}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert [done for done, _ in told].count(manifest.size) == 1
    assert len(told) > len(manifest.files)  # The large file in steps.
    told.clear()
    check(folder, manifest, lambda done, total: told.append((done, total)))
    assert told[-1] == (manifest.size, manifest.size)


@pytest.mark.slow
def test_check_does_not_hash_on_after_a_difference(folder: Path) -> None:
    """The largest file goes first and is wrong: of 300 others nearly all are left."""
    for index in range(300):
        (folder / f"{index:03}").write_bytes(bytes(1_000_000))
    manifest = lock(folder)
    _flip(folder / "model.safetensors", 0)
    told: list[int] = []
    with pytest.raises(WeightsError, match="wrong content: model"):
        check(folder, manifest, lambda done, _: told.append(done))
    assert told[-1] < manifest.size / 2


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core hashes one file after another")
@pytest.mark.slow
def test_check_stops_a_file_that_is_being_hashed(folder: Path) -> None:
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(1_000_000_000)
    manifest = lock(folder)
    _flip(folder / "model.safetensors", 0)
    told: list[int] = []
    with pytest.raises(WeightsError, match="wrong content: model"):
        check(folder, manifest, lambda done, _: told.append(done))
    assert told[-1] < manifest.size / 2


class Terminal(io.StringIO):
    """A stream that is a terminal, or says so."""

    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal() -> None:
    now = [0.0]
    stream, lines = Terminal(), list[str]()
    progress = ProgressLine("weights demo/e5", lines.append, stream, lambda: now[0])
    for step in range(1, 101):
        now[0] = step / 16  # Exact in binary.
        progress(step * 40_000_000, 4_000_000_000)
    assert not lines
    drawn = stream.getvalue().split("\r\033[K")[1:]
    assert len(drawn) == 50  # Eight a second: not more often than every 0.1 s.
    assert drawn[24] == "weights demo/e5 |############------------| 50% of 4.00 GB, 0.64 GB/s, 3 s left"
    assert drawn[-1] == "weights demo/e5 |########################| 100% of 4.00 GB, 0.64 GB/s\n"


@pytest.mark.parametrize(("seconds", "lines"), [(100, 10), (1000, 100), (5, 5), (0.5, 1)])
def test_lines_in_a_log(seconds: float, lines: int) -> None:
    now = [0.0]
    stream, said = io.StringIO(), list[str]()
    progress = ProgressLine("weights demo/e5", said.append, stream, lambda: now[0])
    for step in range(1, 1001):
        now[0] = seconds * step / 1000
        progress(step * 40_000_000, 40_000_000_000)
    assert stream.getvalue() == ""
    assert len(said) == pytest.approx(lines, abs=1)
    assert said[-1].startswith("weights demo/e5: 100% of 40.00 GB, ")


def test_progress_of_no_bytes() -> None:
    said = list[str]()
    ProgressLine("weights", said.append, io.StringIO())(0, 0)
    assert len(said) == 1


def test_load_refuses_truncated_manifests(folder: Path) -> None:
    path = folder / NAME
    lock(folder).save(path)
    text = path.read_bytes()
    for length in range(len(text) - 1):  # The last byte is a newline.
        path.write_bytes(text[:length])
        with pytest.raises(WeightsError):
            Manifest.load(path)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

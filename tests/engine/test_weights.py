"""The weights' manifest: what it accepts is exactly the folder that it was made of."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from inference.engine.weights import NAME, Manifest, WeightsError, WeightsFile, check, lock


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
    assert Manifest((WeightsFile(*entry),)).root == hashlib.sha256(b"cloister weights v1\0" + text.encode()).digest()


def test_manifest_is_no_part_of_itself(folder: Path) -> None:
    manifest = lock(folder)
    manifest.save(folder / NAME)
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

"""A model's folder: given, or fetched from the hub by the engines' environment (the gateway has no hub client)."""

import shutil
import subprocess
from pathlib import Path

# `local_dir` makes plain files instead of links into a cache. The hub's own notes about them are not part of the model.
_FETCH = """
import shutil, sys
from huggingface_hub import snapshot_download
folder = sys.argv[3]
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=folder)
shutil.rmtree(folder + "/.cache", ignore_errors=True)
"""


class HubError(Exception):
    """The model cannot be obtained. The message says what to do."""


def resolve(source: str, revision: str | None, python: Path, store: Path) -> Path:
    """The folder of `source`, a local folder or a hub id at `revision`. Fetched folders are kept under `store`.

    Raises `HubError`. A hub id needs its revision: without one, two starts could serve different weights under one
    configuration.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder.absolute()
    if revision is None:
        raise HubError(
            f'{source} is not a local folder; if it is a hub id, add revision = "<commit>" to pin what is served'
        )
    kept = store.absolute() / f"{source.replace('/', '--')}@{revision}"
    if kept.is_dir():
        return kept
    partial = kept.with_name(kept.name + ".partial")
    try:
        subprocess.run(
            [str(python), "-c", _FETCH, source, revision, str(partial)], stderr=subprocess.PIPE, text=True, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HubError(f"{source} at {revision} cannot be fetched from the hub: {last}") from error
    except OSError as error:
        raise HubError(f"{python} cannot be run ({error.strerror}); `make engine-env` installs it") from error
    if not any(partial.iterdir()):
        shutil.rmtree(partial)
        raise HubError(f"{source} at {revision} holds no files")
    partial.rename(kept)
    return kept

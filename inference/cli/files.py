"""What several commands share: arguments that name files, and files with a private key."""

import os
from pathlib import Path

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def make_key(path: Path) -> Ed25519PrivateKey:
    """A new key, in a new file for this user only. Raises `OSError`; `FileExistsError` rather than overwrite a file."""
    made = Ed25519PrivateKey.generate()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


def read_key(path: Path, maker: str) -> Ed25519PrivateKey:
    """The key in the file. `maker` is the command that makes such keys. Raises `ValueError` with a text for people."""
    try:
        held = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a private key in PEM") from error
    if not isinstance(held, Ed25519PrivateKey):
        raise ValueError(f"{path} is not an Ed25519 key; `{maker}` makes one")
    return held

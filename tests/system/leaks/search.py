"""What must not be found, in every form that a program gives to bytes, and the search for it."""

import base64
import json
import os
import secrets
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Canary:
    """A secret: its name, and its bytes. `also`: further forms, such as a prompt's token numbers."""

    name: str
    data: bytes
    also: tuple[bytes, ...] = ()

    @classmethod
    def text(cls, name: str) -> "Canary":
        """A new word that occurs nowhere else: letters and digits, so that no encoding of text changes it."""
        return cls(name, f"{name}{secrets.token_hex(8)}".encode())

    def forms(self) -> set[bytes]:
        """As it is, in hexadecimal, base64 (wherever it stands in what was encoded), UTF-16, and as others write it."""
        data = self.data
        forms = {data, data[::-1], data.hex().encode(), data.hex().upper().encode(), *self.also}
        forms |= {", ".join(map(str, data)).encode(), repr(data)[2:-1].encode(), data.upper()}
        for lead in range(3):
            coded = base64.b64encode(bytes(lead) + data)
            # Without the characters that the neighbours have a part in.
            start, end = (0, 2, 3)[lead], len(coded) - (4 if (lead + len(data)) % 3 else 0)
            forms |= {coded[start:end], coded[start:end].translate(bytes.maketrans(b"+/", b"-_"))}
        text = data.decode("latin-1")
        forms |= {text.encode("utf-16-le"), json.dumps(text)[1:-1].encode()}
        forms.add(urllib.parse.quote_from_bytes(data).encode())
        return {form for form in forms if len(form) >= 8}


@dataclass(frozen=True)
class Hit:
    """A leak."""

    place: str
    canary: str


class Searcher:
    """Looks for all forms of all canaries. Raises `ValueError` if there are none."""

    def __init__(self, canaries: Iterable[Canary]) -> None:
        self._forms = [(canary.name, form) for canary in canaries for form in canary.forms()]
        if not self._forms:
            raise ValueError("nothing to look for")
        self._overlap = max(len(form) for _, form in self._forms) - 1

    def data(self, place: str, data: bytes) -> set[Hit]:
        """What is found in these bytes."""
        return {Hit(place, name) for name, form in self._forms if form in data}

    def file(self, place: str, file: BinaryIO) -> set[Hit]:
        """What is found in a file of any size, also across its blocks."""
        hits: set[Hit] = set()
        tail = b""
        while block := file.read(_BLOCK):
            hits |= self.data(place, tail + block)
            tail = (tail + block)[-self._overlap :]
        return hits

    def path(self, path: Path) -> set[Hit]:
        """What is found in a file and in its name."""
        hits = self.data(f"name of {path}", bytes(path))
        with path.open("rb") as file:
            return hits | self.file(str(path), file)


def tree(roots: Iterable[Path], since: float) -> Iterator[Path]:
    """Regular files below `roots` that were changed since then (Unix seconds)."""
    for root in roots:
        for folder, _, files in os.walk(root):
            for name in files:
                path = Path(folder, name)
                try:
                    about = path.lstat()
                except OSError:
                    continue
                if about.st_mode & 0o170000 == 0o100000 and max(about.st_mtime, about.st_ctime) >= since:
                    yield path

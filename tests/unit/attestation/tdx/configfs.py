"""A directory that acts as configfs-tsm on a TDX machine: a directory made in it has files that answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Entry(type(Path())):  # type: ignore[misc]
    """A path under the fake root. Making a directory fills it; reading `outblob` has the quote made; removing the
    directory removes what the kernel put there."""

    quote: Callable[[bytes], bytes] = staticmethod(lambda inblob: inblob)
    provider = "tdx_guest"

    def mkdir(self, *args: Any, **options: Any) -> None:
        super().mkdir(*args, **options)
        plain = Path(self)
        for name, content in (("provider", self.provider + "\n"), ("generation", "0\n"), ("inblob", "")):
            (plain / name).write_text(content)

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        folder = Path(self).parent
        if self.name == "inblob":
            generation = folder / "generation"
            generation.write_text(f"{int(generation.read_text()) + 1}\n")
        if self.name == "outblob":
            (folder / "outblob").write_bytes(type(self).quote((folder / "inblob").read_bytes()))
        return super().open(mode, *args, **options)

    def rmdir(self) -> None:
        for file in Path(self).iterdir():
            file.unlink()
        super().rmdir()


def configfs(root: Path, quote: Callable[[bytes], bytes], provider: str = "tdx_guest") -> Path:
    """`quote` is what the machine answers for 64 bytes."""
    kind = type("Machine", (Entry,), {"quote": staticmethod(quote), "provider": provider})
    return kind(root)  # type: ignore[no-any-return]

"""The files of a bundle, in a folder or in a tar file that is never extracted."""

from __future__ import annotations

import os
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from loquent.engine.errors import BundleError
from loquent.engine.fields import MANIFEST

# Of all files in a tar together; a compressed bomb is refused by the sizes in its headers.
_MAX_BYTES = 4 << 30


class BundleFiles(Protocol):
    """Something that holds files by name."""

    @property
    def where(self) -> str:
        """What to call it in messages."""

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises BundleError if there is none of this name."""


class Folder:
    """A bundle in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises BundleError if it cannot be read."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError as exc:
            raise _missing(name) from exc
        except OSError as exc:
            raise BundleError(f"{name} cannot be read: {exc.strerror}") from exc


class Tar:
    """A bundle in a tar file, compressed or not, held in memory."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            with tarfile.open(path) as tar:
                self._files = dict(self._members(tar))
        except (tarfile.TarError, OSError, EOFError, zlib.error) as exc:
            raise BundleError(
                f"{path}: got a file that cannot be read as tar ({str(exc).splitlines()[0]}), "
                "expected a bundle; copy or export it again"
            ) from exc

    def _members(self, tar: tarfile.TarFile) -> list[tuple[str, bytes]]:
        total = 0
        files: dict[PurePosixPath, bytes] = {}
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise BundleError(
                    f"{self.where}: got the member {member.name!r}, which points outside the "
                    "archive, expected plain file names; do not trust where it comes from"
                )
            if member.isdir():
                continue
            total += member.size
            if total > _MAX_BYTES:
                raise BundleError(f"{self.where}: got over {_MAX_BYTES} bytes of files in the tar")
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise BundleError(
                    f"{self.where}: got the member {member.name!r}, which is no regular file; pack "
                    "the bundle again, without links"
                )
            files[name] = content.read()
        # `tar cf en.tar en/` puts a folder around the files; both ways are fine.
        roots = [name.parent for name in files if name.name == MANIFEST]
        root = min(roots, key=lambda path: len(path.parts), default=PurePosixPath())
        return [(name.name, data) for name, data in files.items() if name.parent == root]

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises BundleError if there is none of this name."""
        if name not in self._files:
            raise _missing(name)
        return self._files[name]


def open_files(source: str | os.PathLike[str], *, bundled: Path) -> BundleFiles:
    """Find a bundle.

    Args:
        source: a path, or the plain name of a folder in ``bundled``; such a name wins over a path.
        bundled: folder with the bundles that came with Loquent.

    Raises:
        BundleError: there is nothing there.
    """
    path = Path(source)
    names = sorted(folder.parent.name for folder in bundled.glob(f"*/{MANIFEST}"))
    if os.fspath(source) in names:
        return Folder(bundled / path)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Tar(path)
    known = ", ".join(names) or "none in this installation"
    raise BundleError(
        f"got bundle {os.fspath(source)!r}, expected a folder, a tar file or a bundle that came "
        f"with Loquent ({known})"
    )


def _missing(name: str) -> BundleError:
    if name == MANIFEST:
        return BundleError(
            f"no bundle, {MANIFEST} is missing; give the folder or tar that "
            "`loquent export` has written"
        )
    return BundleError(f"{name} is missing; copy or export the bundle again")

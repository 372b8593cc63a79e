"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from gptx.errors import ConvertError, ParameterError, shown

_STALE_SECONDS = 3600


class AtomicFile:
    """Writes beside the destination, and takes its name only when all bytes are on the disk.

    Used as a context manager. On a clean exit the part is synced and renamed and the folder synced;
    on any exception, KeyboardInterrupt included, the part is removed and the destination is what it
    was. A part that a killed process left is removed by the next writer after an hour.

    Args:
        path: the destination; a symbolic link is followed to its target.
        size: bytes that will be written; refused early where the disk has less room.
        force: replace an existing file. Otherwise even one that appears meanwhile stays.
        mode: permissions; None means 0666 less the umask.

    Raises:
        ParameterError: the destination exists and force is false, or is not a regular file.
        ConvertError: it cannot be written (no room, no permission, no folder); the text holds the
            reason of the system, ``__cause__`` the OSError.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: int, *, force: bool, mode: int | None = None
    ) -> None:
        self.path = Path(path)
        self._target = _follow(self.path)
        self._size = size
        self._force = force
        self._mode = mode
        stem = self._target.name.removesuffix(".gptx")[:128]
        self._part = self._target.with_name(f".{stem}.gptx-{os.urandom(4).hex()}.part")
        self._pattern = re.compile(rf"\.{re.escape(stem)}\.gptx-[0-9a-f]{{8}}\.part")
        self._file: BinaryIO | None = None

    def __enter__(self) -> AtomicFile:
        self._check_destination()
        try:
            self._remove_stale_parts()
            self._check_room()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(self._part, flags, 0o666), "wb")
            if self._mode is not None:
                self._part.chmod(self._mode)
        except BaseException as error:
            self._discard()
            self._explain(error)
            raise
        return self

    def write(self, data: bytes | memoryview, at: int | None = None) -> None:
        """Appends bytes or a contiguous array, or writes them at an offset."""
        assert self._file is not None
        try:
            if at is not None:
                self._file.seek(at)
            self._file.write(data)
        except OSError as error:
            self._explain(error)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            self._explain(failure)
        finally:
            self._discard()

    def _commit(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._force:
            self._part.replace(self._target)
        else:
            self._name_without_replacing()
        _sync_folder(self._target.parent)

    def _name_without_replacing(self) -> None:
        try:
            self._target.hardlink_to(self._part)
        except FileExistsError:
            self._refuse_existing()
        except OSError:
            # A file system without hard links: the gap between look and rename is accepted.
            if self._target.exists():
                self._refuse_existing()
            self._part.replace(self._target)

    def _discard(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _check_destination(self) -> None:
        try:
            mode = self._target.lstat().st_mode
        except OSError:
            return
        if not stat.S_ISREG(mode):
            raise ParameterError("path", str(self.path), "a regular file, or a name not in use")
        if not self._force:
            self._refuse_existing()

    def _refuse_existing(self) -> None:
        allowed = f"True to replace the existing file {shown(str(self.path))}"
        raise ParameterError("force", False, allowed)

    def _remove_stale_parts(self) -> None:
        for entry in os.scandir(self._target.parent):
            if not self._pattern.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > _STALE_SECONDS:
                    Path(entry).unlink()

    def _check_room(self) -> None:
        if not hasattr(os, "statvfs"):
            return
        disk = os.statvfs(self._target.parent)
        free = disk.f_bavail * disk.f_frsize
        if self._size > free:
            raise ConvertError(
                f"{self.path}: needs {self._size:,} bytes, {free:,} are free in "
                f"{self._target.parent} (ENOSPC); free some space or choose another folder"
            )

    def _explain(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            raise _cannot_write(self.path, error) from error


def _cannot_write(path: Path, error: OSError) -> ConvertError:
    code = errno.errorcode.get(error.errno or 0, "no errno")
    return ConvertError(f"{path}: cannot be written: {error.strerror or error} ({code})")


def _follow(path: Path) -> Path:
    try:
        target = path.resolve()
        is_loop = target.is_symlink()
    except OSError as error:
        raise _cannot_write(path, error) from error
    except RuntimeError:  # what a loop is before Python 3.13
        is_loop = True
    if is_loop:
        raise _cannot_write(path, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
    return target


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable. Not every system can open a folder; there it is not needed."""
    with contextlib.suppress(PermissionError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

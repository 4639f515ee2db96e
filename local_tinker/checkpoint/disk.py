"""Every change to the disk that a save makes goes through a `Disk`, so that tests can record, fail or kill at each."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError
from .names import leftover_path

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
# O_NONBLOCK: a planted FIFO must not hang the reader.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_WRITE_CHUNK = 64 << 20  # one write call on Linux moves at most 2 GiB
# Some network file systems refuse to sync a directory and order its entries themselves.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)

_ADVICE = {
    errno.ENOSPC: "free space there or save elsewhere",
    errno.EDQUOT: "free some of your quota or save elsewhere",
    errno.EROFS: "the file system is read-only: save elsewhere",
    errno.EACCES: "you may not write there: save elsewhere or change its permissions",
    errno.EPERM: "you may not write there: save elsewhere or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the device reports an error: check it before saving again",
}


class Disk:
    """The system calls of a save, one method each. Stateless."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Open a new file for writing; fails if the name exists, link or not."""
        return os.open(path, _CREATE, 0o666)

    def open(self, path: Path) -> int:
        """Open an existing file for reading, never through a link."""
        return os.open(path, _READ)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        try:
            import fcntl

            full_sync = fcntl.F_FULLFSYNC  # macOS: fsync alone leaves data in the drive's cache
        except (ImportError, AttributeError):
            os.fsync(fd)
            return
        try:
            fcntl.fcntl(fd, full_sync)
        except OSError:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def fsync_dir(self, path: Path) -> None:
        """Make the entries of a directory durable; a no-op where directories cannot be opened (Windows)."""
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def free(self, path: Path) -> int:
        """Bytes an unprivileged process may still write under `path`."""
        return shutil.disk_usage(path).free


@contextmanager
def opened(disk: Disk, fd: int) -> Iterator[int]:
    """Close `fd` at the end; a failing close is an error unless one is already on its way."""
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            disk.close(fd)
        raise
    disk.close(fd)


def write_file(disk: Disk, path: Path, data: bytes | bytearray | memoryview) -> None:
    """Create `path` with `data` and sync it."""
    view = memoryview(data).cast("B")
    with opened(disk, disk.create(path)) as fd:
        while len(view):
            view = view[disk.write(fd, view[:_WRITE_CHUNK]) :]
        disk.fsync(fd)


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder with all it holds."""
    if path.is_symlink() or not path.is_dir():
        disk.unlink(path)
        return
    with os.scandir(path) as entries:
        children = [Path(entry.path) for entry in entries]
    for child in children:
        remove_tree(disk, child)
    disk.rmdir(path)


def replace_file(path: str | Path, data: bytes, *, disk: Disk = Disk()) -> Path:  # noqa: B008 (Disk has no state)
    """Write one file atomically and durably: after a crash it holds the old bytes or the new ones."""
    path = Path(os.path.abspath(path))
    staged = leftover_path("tmp", path)
    with typed_errors(disk, path, need=len(data)):
        try:
            write_file(disk, staged, data)
            disk.replace(staged, path)
        except BaseException:
            with suppress(OSError):
                disk.unlink(staged)
            raise
        disk.fsync_dir(path.parent)
    return path


@contextmanager
def typed_errors(disk: Disk, target: Path, *, need: int, exact: bool = True) -> Iterator[None]:
    """Turn what the system says while saving `target` (`need` bytes) into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _foreign_errno(error)
        if number is None:
            raise
        try:
            free = f"{disk.free(target.parent):,} are free there"
        except OSError:
            free = "free space unknown"
        raise CheckpointError(
            f"could not save {target}: {os.strerror(number)} ({errno.errorcode.get(number, number)}); it needs "
            f"{'' if exact else 'at least '}{need:,} bytes, {free}. "
            f"Earlier checkpoints are untouched; {_ADVICE.get(number, 'see the cause above')}"
        ) from error


def _foreign_errno(error: Exception) -> int | None:
    """The errno inside an error of a Rust library such as safetensors, which raises no OSError."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None

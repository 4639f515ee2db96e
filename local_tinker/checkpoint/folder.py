"""Write a folder whole or not at all; read one only if every byte is as written."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from .disk import Disk, opened, remove_tree, typed_errors, write_file
from .manifest import MANIFEST, WRONG_HASH, FileEntry, corrupt, decode, encode
from .names import Leftover, check_name, leftover_path
from .strict_json import plain

Content = bytes | bytearray | memoryview | Callable[[Path], None]

_READ_CHUNK = 4 << 20
_MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest held when it was read.

    `meta` is what the writer stored. Three of its keys are understood here: `step` (int, orders a listing), `owner`
    (the run that rotation may delete for) and `base_model` (the fingerprint a loader compares).
    """

    path: Path
    meta: dict[str, Any]
    manifest: dict[str, FileEntry]
    created: str

    @property
    def name(self) -> str:
        return self.path.name

    def file(self, name: str) -> Path:
        """Path of a file of the manifest. Prefer `bytes`, which verifies exactly what it returns."""
        self._entry(name)
        return self.path / name

    def bytes(self, name: str) -> bytes:
        """The file's content, its size and hash checked on the bytes returned."""
        entry = self._entry(name)
        with _refuse_unreadable(self.path, name), _open_regular(self.path / name, entry.size) as fd:
            data = _read_all(fd)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise corrupt(self.path, name, WRONG_HASH)
        return data

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest:
            raise UsageError(f"{self.path} holds no {name!r}; it holds {', '.join(sorted(self.manifest))}")
        return self.manifest[name]


def write_folder(
    target: str | Path,
    files: Mapping[str, Content],
    *,
    meta: dict[str, Any],
    overwrite: bool = False,
    reserve: int | None = None,
    disk: Disk = Disk(),  # noqa: B008 (Disk has no state)
) -> Path:
    """Write `files` as the folder `target`; when this returns, the folder survives a crash or a power cut.

    Args:
        files: name -> bytes, or a function that writes the file at the path it is given.
        meta: plain JSON values, stored in the manifest.
        overwrite: replace a folder written here before. The old one stays until the new one is durable.
        reserve: bytes the functions in `files` will write, for the check of free space before anything is written.

    Raises CheckpointError, naming the path and the bytes needed, with nothing left behind and older folders untouched.
    """
    target = _check_target_name(target)
    _check_files(files)
    meta = plain(meta)
    sizes = {name: memoryview(content).nbytes for name, content in files.items() if not callable(content)}
    need = sum(sizes.values()) + (reserve or 0)
    exact = reserve is not None or len(sizes) == len(files)
    with typed_errors(disk, target, need=need, exact=exact):
        _make_parents(target.parent, disk)
        recover(target, disk=disk, own=True)
        _check_target(target, overwrite)
        if disk.free(target.parent) < need:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        staged = leftover_path("tmp", target)
        try:
            disk.mkdir(staged)
            entries = {name: _write_one(disk, staged / name, content) for name, content in files.items()}
            _check_staged(staged, files)
            write_file(disk, staged / MANIFEST, encode(entries, meta, datetime.now(UTC).isoformat()))
            disk.fsync_dir(staged)
            aside = _publish(staged, target, overwrite, disk)
        except BaseException:
            with suppress(OSError):
                remove_tree(disk, staged)
            raise
    # The save stands. What cannot be removed now is a hidden leftover that `sweep` removes.
    with suppress(OSError):
        if aside is not None:
            _delete(aside, target, disk)
    return target


def stage_folder(
    target: str | Path,
    files: Mapping[str, bytes],
    *,
    folders: tuple[str, ...] = (),
    disk: Disk = Disk(),  # noqa: B008
) -> Path:
    """Make a new folder, with files and empty folders in it, that appears whole. It has no manifest: it will change."""
    target = _check_target_name(target)
    with typed_errors(disk, target, need=sum(map(len, files.values()))):
        _make_parents(target.parent, disk)
        _check_target(target, overwrite=False)
        staged = leftover_path("tmp", target)
        try:
            disk.mkdir(staged)
            for name in folders:
                disk.mkdir(staged / check_name(name))
            for name, content in files.items():
                write_file(disk, staged / check_name(name), content)
            disk.fsync_dir(staged)
            _publish(staged, target, False, disk)
        except BaseException:
            with suppress(OSError):
                remove_tree(disk, staged)
            raise
    return target


def read_folder(path: str | Path, *, verify: str = "hash", disk: Disk = Disk()) -> Checkpoint:  # noqa: B008
    """Check a folder against its manifest and describe it. No file outside the manifest is opened.

    Args:
        verify: "hash" reads every byte; "size" compares names and sizes only (the manifest is always verified).

    Raises CorruptCheckpointError naming the file that is missing, changed or not ours, and CheckpointError for a folder
    that is no checkpoint or of an unknown format version.
    """
    if verify not in ("hash", "size"):
        raise UsageError(f"got verify={verify!r}: it is 'hash' or 'size'")
    path = Path(os.path.abspath(path))
    if not os.path.lexists(path):
        recover(path, disk=disk)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name one that holds a {MANIFEST}")
    with _refuse_unreadable(path, MANIFEST):
        present = set(os.listdir(path))
        if MANIFEST not in present:
            raise CheckpointError(f"{path} holds no {MANIFEST}: it is not a checkpoint, or it was never completed")
        with _open_regular(path / MANIFEST, None) as fd:
            size = os.fstat(fd).st_size
            if size > _MANIFEST_LIMIT:
                raise corrupt(path, MANIFEST, f"is {size:,} bytes, more than the {_MANIFEST_LIMIT:,} allowed")
            raw = _read_all(fd)
    entries, meta, created = decode(path, raw)
    checkpoint = Checkpoint(path, meta, entries, created)
    _compare_names(path, present, set(checkpoint.manifest))
    for name, entry in checkpoint.manifest.items():
        with _refuse_unreadable(path, name), _open_regular(path / name, entry.size) as fd:
            if verify == "hash" and _hash(fd) != entry.sha256:
                raise corrupt(path, name, WRONG_HASH)
    return checkpoint


def load_tensors(checkpoint: Checkpoint, name: str) -> bytes:
    """Verified bytes of a .safetensors file, for `safetensors.torch.load` or its numpy twin."""
    if not name.endswith(".safetensors"):
        raise UsageError(f"got {name!r}: tensors are read from .safetensors files only, never from pickles")
    return checkpoint.bytes(name)


def recover(target: Path, *, disk: Disk, own: bool = False) -> None:
    """Put back the old folder of an overwrite that died between its two renames.

    `own` also takes what this process itself left, for a writer that is about to write `target`.
    """
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    asides = []
    for entry in os.listdir(target.parent):
        left = Leftover.parse(entry)
        if left is None or left.kind != "old" or left.name != target.name:
            continue
        mine = left.process.pid == os.getpid() and left.process.here
        # A process of another host may be alive, but putting its folder back can only make its own rename fail loudly.
        if left.process.gone or not left.process.here or (own and mine):
            asides.append(target.with_name(entry))
    if asides:
        # An older overwrite may have died before deleting its own; the rename that put a folder aside set its ctime.
        disk.rename(max(asides, key=lambda path: os.lstat(path).st_ctime_ns), target)


# writing


def _check_files(files: Mapping[str, Content]) -> None:
    if not files:
        raise UsageError("got no files to save: a folder holds at least one")
    folded: dict[str, str] = {}
    for name in files:
        check_name(name)
        other = folded.setdefault(name.casefold(), name)
        if name.casefold() == MANIFEST.casefold() or other != name:
            raise UsageError(f"the file name {name!r} collides with {other if other != name else MANIFEST!r}")


def _check_target_name(target: str | Path) -> Path:
    # Asked before ".." is folded away, which would name another folder than the one typed.
    name = Path(target).name
    if not name or name.startswith(".") or "\0" in str(target):
        raise UsageError(f"cannot save as {str(target)!r}: the last part must be a name that does not start with a dot")
    return Path(os.path.abspath(target))


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or pass overwrite=True to replace it")
    # Replacing deletes the old folder, so a mistyped path must not cost someone their home directory.
    if target.is_symlink() or not target.is_dir() or not ((target / MANIFEST).is_file() or not os.listdir(target)):
        raise CheckpointError(
            f"{target} is not a folder saved by local-tinker, so it is not replaced: remove it yourself"
        )


def _make_parents(folder: Path, disk: Disk) -> None:
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with suppress(FileExistsError):
            disk.mkdir(path)
        disk.fsync_dir(path.parent)


def _write_one(disk: Disk, path: Path, content: Content) -> FileEntry:
    if not callable(content):
        write_file(disk, path, content)
        return FileEntry(memoryview(content).nbytes, hashlib.sha256(content).hexdigest())
    content(path)
    with opened(disk, disk.open(path)) as fd:
        disk.fsync(fd)
        return FileEntry(os.fstat(fd).st_size, _hash(fd))


def _check_staged(staged: Path, files: Mapping[str, Content]) -> None:
    extra = set(os.listdir(staged)) - set(files)
    if extra:
        raise CheckpointError(f"a function writing one of {sorted(files)} also left {sorted(extra)} in {staged.name}")


def _publish(staged: Path, target: Path, overwrite: bool, disk: Disk) -> Path | None:
    """Rename `staged` to `target` durably; returns where the old folder went. On any error all is as before."""
    aside = leftover_path("old", target) if overwrite and os.path.lexists(target) else None
    try:
        if aside is not None:
            disk.rename(target, aside)
        disk.rename(staged, target)
        disk.fsync_dir(target.parent)
    except BaseException:
        # Asked of the disk, not of flags: an interrupt may arrive between a rename and the next line.
        with suppress(OSError):
            if not os.path.lexists(staged):
                disk.rename(target, staged)
            if aside is not None and os.path.lexists(aside):
                disk.rename(aside, target)
        raise
    return aside


def _delete(path: Path, target: Path, disk: Disk) -> None:
    """Remove a folder that was `target`: renamed first, so that a half-removed one is never listed or put back."""
    doomed = leftover_path("del", target)
    disk.rename(path, doomed)
    remove_tree(disk, doomed)


# reading


@contextmanager
def _open_regular(path: Path, size: int | None) -> Iterator[int]:
    disk = Disk()
    with opened(disk, disk.open(path)) as fd:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise corrupt(path.parent, path.name, "is not a regular file")
        if size is not None and info.st_size != size:
            raise corrupt(path.parent, path.name, f"has {info.st_size:,} bytes, its manifest says {size:,}")
        yield fd


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        return file.readall()


def _hash(fd: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(fd, _READ_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _compare_names(path: Path, present: set[str], listed: set[str]) -> None:
    for name in sorted(listed - present):
        raise corrupt(path, name, "is missing")
    for name in sorted(present - listed - {MANIFEST}):
        raise corrupt(path, name, "is not in its manifest: move it away")


@contextmanager
def _refuse_unreadable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise corrupt(path, name, reason) from error

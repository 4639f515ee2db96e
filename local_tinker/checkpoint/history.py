"""The checkpoints of one directory: list them, find the newest good one, delete old ones, clear up after crashes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError, UsageError
from .disk import Disk, remove_tree
from .folder import Checkpoint, read_folder, recover
from .names import Leftover, leftover_path

# Leftovers of another machine, container or boot carry pids that say nothing here; no save lasts this long.
_FOREIGN_AGE_S = 24 * 3600.0


def list_checkpoints(root: str | Path, *, verify: str = "size", disk: Disk = Disk()) -> list[Checkpoint]:  # noqa: B008
    """Every folder in `root` with a valid manifest, oldest first (by `meta["step"]`, then by time written)."""
    root = Path(root)
    if not root.is_dir():
        return []
    return _read_all(root, verify, disk, None)


def latest_valid(root: str | Path, *, say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint whose hashes hold, or None. `say` hears of each folder that was passed over."""
    root = Path(root)
    for checkpoint in reversed(_read_all(root, "size", Disk(), say) if root.is_dir() else []):
        try:
            return read_folder(checkpoint.path)
        except CheckpointError as error:
            if say:
                say(f"passed over {error}")
    return None


def rotate(
    root: str | Path,
    keep_last: int,
    keep: Collection[str] = frozenset(),
    *,
    owner: str | None,
    disk: Disk = Disk(),  # noqa: B008 (Disk has no state)
) -> list[str]:
    """Delete `owner`'s checkpoints but the newest `keep_last` and those named in `keep`; returns the names deleted.

    The owner of a checkpoint is its `meta["owner"]`; `owner=None` means those that name none.

    Nothing is deleted unless one that stays has just been verified by hash; folders of other runs, and folders that
    cannot be read, are never touched.
    """
    if keep_last < 1:
        raise UsageError(f"got keep_last={keep_last}: at least 1 checkpoint stays")
    own = [checkpoint for checkpoint in list_checkpoints(root, disk=disk) if checkpoint.meta.get("owner") == owner]
    victims = [checkpoint for checkpoint in own[:-keep_last] if checkpoint.name not in keep]
    stays = [checkpoint for checkpoint in own if checkpoint not in victims]
    if victims and not any(_holds(checkpoint) for checkpoint in reversed(stays)):
        good = next((checkpoint for checkpoint in reversed(victims) if _holds(checkpoint)), None)
        victims = [checkpoint for checkpoint in victims if good is not None and checkpoint is not good]
    try:
        for victim in victims:
            doomed = leftover_path("del", victim.path)
            disk.rename(victim.path, doomed)
            remove_tree(disk, doomed)
    except OSError as error:
        raise CheckpointError(
            f"could not delete the old checkpoint {error.filename or root}: {error.strerror}; newer ones are "
            "untouched, delete it by hand or change its permissions"
        ) from error
    return [victim.name for victim in victims]


def sweep(root: str | Path, *, disk: Disk = Disk()) -> list[str]:  # noqa: B008
    """Clear up after processes that died while saving or deleting; returns the entries removed.

    An overwrite that died between its renames is undone. Entries of live processes and of other software stay.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    _recover_all(root, disk)
    swept = []
    for entry in sorted(os.listdir(root)):
        left = Leftover.parse(entry)
        if left is None or not _abandoned(root / entry, left):
            continue
        try:
            remove_tree(disk, root / entry)
        except FileNotFoundError:
            continue  # another process swept it first
        except OSError as error:
            raise CheckpointError(
                f"could not remove the leftover {root / entry}: {error.strerror}; remove it by hand"
            ) from error
        swept.append(entry)
    return swept


def _abandoned(path: Path, left: Leftover) -> bool:
    if left.process.here:
        return left.process.gone
    try:
        # A rename changes ctime only.
        newest = max(os.lstat(path).st_mtime, os.lstat(path).st_ctime)
    except FileNotFoundError:
        return False
    return time.time() - newest > _FOREIGN_AGE_S


def _read_all(root: Path, verify: str, disk: Disk, say: Callable[[str], None] | None) -> list[Checkpoint]:
    _recover_all(root, disk)
    found = []
    for path in sorted(root.iterdir()):
        # A link in the directory may lead anywhere.
        if path.name.startswith(".") or path.is_symlink() or not path.is_dir():
            continue
        try:
            found.append(read_folder(path, verify=verify, disk=disk))
        except CheckpointError as error:
            if say:
                say(f"passed over {error}")
    return sorted(found, key=_age_key)


def _recover_all(root: Path, disk: Disk) -> None:
    for entry in os.listdir(root):
        left = Leftover.parse(entry)
        if left is not None and left.kind == "old":
            # Where the directory cannot be written, reading it still works.
            with suppress(OSError):
                recover(root / left.name, disk=disk)


def _holds(checkpoint: Checkpoint) -> bool:
    try:
        read_folder(checkpoint.path)
    except CheckpointError:
        return False
    return True


def _age_key(checkpoint: Checkpoint) -> tuple[int, str, str]:
    step = checkpoint.meta.get("step")
    return (step if isinstance(step, int) and not isinstance(step, bool) else -1, checkpoint.created, checkpoint.name)

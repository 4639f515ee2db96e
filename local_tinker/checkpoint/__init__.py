"""Folders that are written whole or not at all, and verified when read.

A save is staged beside its target, hashed, synced, renamed into place, and acknowledged only when the parent directory
is on disk. Nothing here imports torch, and nothing here unpickles: files are bytes, descriptions are strict JSON.
"""

from __future__ import annotations

from .disk import Disk, replace_file
from .folder import Checkpoint, load_tensors, read_folder, stage_folder, write_folder
from .history import latest_valid, list_checkpoints, rotate, sweep
from .lock import FolderLock
from .manifest import FORMAT_VERSION, MANIFEST, FileEntry
from .names import ProcessMark, check_name, inside
from .strict_json import dump_json, parse_json, plain

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Checkpoint",
    "Disk",
    "FileEntry",
    "FolderLock",
    "ProcessMark",
    "check_name",
    "dump_json",
    "inside",
    "latest_valid",
    "list_checkpoints",
    "load_tensors",
    "parse_json",
    "plain",
    "read_folder",
    "replace_file",
    "rotate",
    "stage_folder",
    "sweep",
    "write_folder",
]

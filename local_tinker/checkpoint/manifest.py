"""The manifest of a saved folder: what it holds, and proof that it says what was written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError
from .names import check_name
from .strict_json import dump_json, parse_json

MANIFEST = "MANIFEST.json"
FORMAT = "local-tinker-folder"
FORMAT_VERSION = 1
WRONG_HASH = "does not have the sha256 its manifest says"


@dataclass(frozen=True)
class FileEntry:
    """One line of a manifest: bytes and hex digest of a file."""

    size: int
    sha256: str


def encode(entries: dict[str, FileEntry], meta: dict[str, Any], created: str) -> bytes:
    """Canonical bytes, with the sha256 of everything else inside."""
    body = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "created": created,
        "meta": meta,
        "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in entries.items()},
    }
    return dump_json({**body, "sha256": hashlib.sha256(dump_json(body)).hexdigest()})


def decode(path: Path, raw: bytes) -> tuple[dict[str, FileEntry], dict[str, Any], str]:
    """Files, meta and creation time of the manifest of the folder `path`, checked to the byte."""
    try:
        document = parse_json(raw)
    except ValueError as error:
        raise corrupt(path, MANIFEST, f"is not valid JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise corrupt(path, MANIFEST, f"does not say format {FORMAT!r}")
    version = document.get("version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST} has format version {version!r}; this local-tinker reads {FORMAT_VERSION}: "
            "upgrade it, or save again with this one"
        )
    try:
        entries = {name: FileEntry(int(e["size"]), str(e["sha256"])) for name, e in document["files"].items()}
        for name in entries:
            check_name(name)
        meta, created = document["meta"], document["created"]
        # Written canonically, so comparing the bytes also catches a changed space.
        intact = raw == encode(entries, meta, created) and isinstance(meta, dict) and isinstance(created, str)
    except (KeyError, TypeError, AttributeError, ValueError, CheckpointError) as error:
        raise corrupt(path, MANIFEST, f"is not a manifest of this format ({error})") from None
    if not intact:
        raise corrupt(path, MANIFEST, "does not match its own sha256")
    return entries, meta, created


def corrupt(path: Path, name: str, reason: str) -> CorruptCheckpointError:
    """The error for file `name` of the folder `path`."""
    shown = name if name.isprintable() else repr(name)
    return CorruptCheckpointError(f"{path}: {shown} {reason}; this checkpoint is not loaded, use another one")

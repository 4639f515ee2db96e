"""Names that become paths, and the names of leftovers, which say which process made them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Windows opens a device for these, whatever follows the first dot.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_LEFTOVER = re.compile(r"\.(tmp|old|del)-(.+)-(\d+)-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}", re.DOTALL)


def check_name(name: str) -> str:
    """Return `name` if it is safe as one path component on every platform, else raise UsageError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith(".") or _DEVICES.fullmatch(name):
        shown = repr(name)
        raise UsageError(
            f"got the name {shown if len(shown) <= 160 else shown[:160] + '...'}: a name is 1 to 128 of A-Z a-z 0-9 . "
            "_ and -, starts with a letter or digit, does not end in a dot and is no device name such as CON"
        )
    return name


def inside(root: str | Path, name: str) -> Path:
    """`root/name`, after checking that the name is plain and that no link leads out of `root`."""
    root = Path(root)
    path = root / check_name(name)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"{path} leads out of {root}: it is a link to {path.resolve()}; remove the link or name another"
        )
    return path


@dataclass(frozen=True)
class ProcessMark:
    """One process, told apart from a later one that was given the same pid.

    `start` is the process's start time (clock ticks on Linux, milliseconds elsewhere; 0 where it cannot be known).
    `host` is 8 hex digits for this machine, boot and pid namespace: pids of another host say nothing here.
    """

    pid: int
    start: int
    host: str

    @classmethod
    def current(cls) -> ProcessMark:
        return cls(os.getpid(), _start_of(os.getpid()) or 0, _host())

    @property
    def here(self) -> bool:
        return self.host == _host()

    @property
    def gone(self) -> bool:
        """True when the process ran here and has ended. A process of another host is never known to be gone."""
        if not self.here:
            return False
        start = _start_of(self.pid)
        return start is None or (0 not in (start, self.start) and start != self.start)


@dataclass(frozen=True)
class Leftover:
    """What a `.tmp-`, `.old-` or `.del-` entry says about itself."""

    kind: str
    name: str
    process: ProcessMark

    @classmethod
    def parse(cls, entry: str) -> Leftover | None:
        match = _LEFTOVER.fullmatch(entry)
        if not match:
            return None
        kind, name, pid, start, host = match.groups()
        return cls(kind, name, ProcessMark(int(pid), int(start), host))


def leftover_path(kind: str, target: Path) -> Path:
    """A fresh hidden path beside `target` (renames across file systems fail) that `Leftover.parse` understands."""
    me = ProcessMark.current()
    return target.with_name(f".{kind}-{target.name}-{me.pid}-{me.start}-{me.host}-{secrets.token_hex(4)}")


def _start_of(pid: int) -> int | None:
    """Start time of a live process, 0 if alive at an unknown time, None if there is none (a zombie has ended)."""
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The command name, in parentheses, may itself hold spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            # Without /proc nothing is known about anybody.
            return None if os.path.exists("/proc/self/stat") else 0
        except OSError:
            return 0
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    try:
        import psutil
    except ImportError:
        return 0
    try:
        return int(psutil.Process(pid).create_time() * 1000)
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:
        return 0


def _host() -> str:
    parts = [os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")]
    if sys.platform == "linux":
        for read in (
            lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
            lambda: os.readlink("/proc/self/ns/pid"),
        ):
            try:
                parts.append(read())
            except OSError:
                parts.append("")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]

"""What the tests of saved folders share, and the child processes they kill.

Run as a script, `python checkpoint_tools.py VERB ARGS...` is such a child: see CHILDREN at the end.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from local_tinker.checkpoint import (
    Disk,
    FolderLock,
    latest_valid,
    list_checkpoints,
    read_folder,
    rotate,
    sweep,
    write_folder,
)
from local_tinker.errors import CheckpointError

FILES = {
    "adapter.safetensors": b"a" * 700,
    "optimizer.safetensors": bytes(range(256)) * 3,
    "state.json": b'{"step": 7}\n',
}


class Watched:
    """A Disk that calls `before(n, name, args)` and `after(...)` around its n-th call (from 1)."""

    def __init__(self, before=None, after=None):
        self.calls, self.before, self.after = [], before, after

    def __getattr__(self, name):
        real = getattr(Disk(), name)

        def call(*args):
            self.calls.append((name, *args))
            number = len(self.calls)
            if self.before:
                self.before(number, name, args)
            result = real(*args)
            if name in ("create", "open"):
                self.calls[-1] = (name, *args, result)
            if self.after:
                self.after(number, name, args)
            return result

        return call


def save(root: Path, step: int, *, disk=None, owner="run-a", overwrite=False, name=None) -> Path:
    files = {**FILES, "state.json": json.dumps({"step": step}).encode()}
    target = root / (name or f"step-{step}")
    meta = {"step": step, "owner": owner, "base_model": "f" * 16}
    return write_folder(target, files, meta=meta, overwrite=overwrite, disk=disk or Disk())


def hidden(root: Path) -> list[str]:
    return sorted(entry for entry in os.listdir(root) if entry.startswith("."))


def change(mode: str, root: Path, disk: object) -> None:
    """One change of a root that holds step-1 and step-2."""
    if mode == "save":
        save(root, 3, disk=disk)
    elif mode == "overwrite":
        save(root, 9, disk=disk, overwrite=True, name="step-2")
    else:
        rotate(root, 1, owner="run-a", disk=disk)


def start(verb: str, *args: object) -> subprocess.Popen:
    """A child process running one of CHILDREN."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, verb, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)


def run_code(code: str, *args: object) -> subprocess.Popen:
    """Run `code` in a new Python to its end; `.out` and `.err` hold what it said."""
    process = start("code", "from local_tinker.checkpoint import *\n" + textwrap.dedent(code), *args)
    process.out, process.err = process.communicate(timeout=60)
    return process


class KillServer:
    """One Python that forks a process for every kill: much cheaper than a new interpreter each."""

    def __enter__(self) -> KillServer:
        self.process = start("kill-server")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def kill(self, mode: str, root: Path, at: int) -> None:
        """Make the change `mode` in a process killed right after its `at`-th system call."""
        self.process.stdin.write(json.dumps([mode, str(root), at]).encode() + b"\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"%d\n" % signal.SIGKILL


def run_parallel(jobs, width=2):
    """Run functions two at a time: each mostly waits for a child."""
    queue, errors = list(jobs), []

    def work():
        while queue and not errors:
            try:
                queue.pop()()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(width)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if errors:
        raise errors[0]


def random_kills(root: Path, kills: int, seed: int) -> None:
    """Kill a process that saves, overwrites and rotates without pause; whatever it acknowledged must be there."""
    chance, step = random.Random(seed), 1
    for _ in range(kills):
        process = start("save-forever", root, step)
        first = process.stdout.readline()
        assert first.strip() == str(step).encode(), process.stderr.read().decode()
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        with process:
            rest = process.stdout.read()  # communicate() would leave out what readline() had already buffered
        # The last line may be cut, so only whole lines were acknowledged.
        said = [int(line) for line in (first + rest).split(b"\n")[:-1]]
        saved = max(said)
        last = -min([*said, 0])
        listed = {checkpoint.name: checkpoint for checkpoint in list_checkpoints(root, verify="hash")}
        assert {name for name in os.listdir(root) if not name.startswith(".")} == set(listed)
        assert f"step-{saved}" in listed
        assert not last or listed["last"].meta["step"] >= last
        sweep(root)
        assert hidden(root) == []
        step = max(checkpoint.meta["step"] for checkpoint in listed.values()) + 1
        assert latest_valid(root).meta["step"] == step - 1


ERRNOS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG]


def fail_everywhere(tmp_path: Path, number: int, *, overwrite: bool, forever: bool) -> None:
    """Save with an error at each system call in turn, or at it and all later ones; then save again."""
    name = "step-1" if overwrite else "step-2"
    count = 1
    for at in range(1, 100):
        root = tmp_path / str(at)
        save(root, 1)
        failing = []

        def before(n, call, args, at=at, failing=failing):
            if n == at or (forever and n > at):
                failing.append(call)
                raise OSError(number, os.strerror(number), "x")

        disk = Watched(before=before)
        try:
            save(root, 2, name=name, overwrite=overwrite, disk=disk)
            if not failing:
                break
            # Only the removal of the replaced folder may fail quietly: the new one is durable by then.
            assert overwrite and "fsync_dir" not in failing and at > count
        except CheckpointError as error:
            count = at
            assert str(root / name) in str(error) and os.strerror(number) in str(error)
            need = sum(map(len, FILES.values())) - 1  # this state.json is one byte shorter
            assert f"needs {need:,} bytes" in str(error)
            present = [c.meta["step"] for c in list_checkpoints(root, verify="hash")]
            if not forever:
                assert present == [1] and hidden(root) == []
            elif failing[0] == "fsync_dir" and "rename" in failing:
                # In place, but neither durable nor taken back: whole, and not acknowledged.
                assert present == [2] if overwrite else present == [1, 2]
            else:
                # An old folder that could not be renamed back comes back with the next save or process.
                assert present == [1] or (overwrite and hidden(root)[0].startswith(".old-step-1-"))
            save(root, 2, name=name, overwrite=overwrite or 2 in present)
        assert latest_valid(root).meta["step"] == 2
        assert forever or not overwrite or len(list_checkpoints(root)) == 1
    assert count > 10


def refusal(path: Path, *, verify: str = "hash") -> str:
    """What reading a damaged folder says."""
    try:
        read_folder(path, verify=verify)
    except CheckpointError as error:
        return str(error).removeprefix(str(path))
    raise AssertionError(f"{path} was read")


def flip_bits(root: Path, flips: int, seed: int) -> None:
    path = save(root, 1)
    chance = random.Random(seed)
    files = sorted(path.iterdir())
    for number in range(flips):
        file = files[number % len(files)]
        data = bytearray(file.read_bytes())
        original = bytes(data)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        assert file.name in refusal(path)
        assert latest_valid(root) is None
        file.write_bytes(original)
    assert read_folder(path).meta["step"] == 1


def damage_lengths(root: Path, points: int, seed: int) -> None:
    path = save(root, 1)
    chance = random.Random(seed)
    for number in range(points):
        file = sorted(path.iterdir())[number % 4]
        original = file.read_bytes()
        cut = chance.randrange(len(original))
        for damaged in (original[:cut], original[:cut] + bytes(len(original) - cut), original + b"\0"):
            if damaged == original:
                continue
            file.write_bytes(damaged)
            assert file.name in refusal(path)
            if len(damaged) != len(original):
                assert file.name in refusal(path, verify="size")
            file.write_bytes(original)


@contextmanager
def small_disks(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """mount(kilobytes) -> a tmpfs of that size; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        where = tmp_path / f"tmpfs-{len(mounted)}"
        where.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(where)]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            import pytest

            pytest.skip("cannot mount a tmpfs here; the injected errors cover this")
        mounted.append(where)
        return where

    try:
        yield mount
    finally:
        for where in mounted:
            subprocess.run(["umount", str(where)], check=True)


def fill_small_disk(root: Path, size: int, *, announce: bool) -> bool:
    """Save `size` bytes beside an existing checkpoint on a small disk; True when it fitted. Checks both outcomes."""
    save(root, 1)
    data = b"z" * size
    content = data if announce else (lambda path: path.write_bytes(data) and None)
    try:
        write_folder(root / "big", {"f": content}, meta={"step": 2})
    except CheckpointError as error:
        assert "ENOSPC" in str(error) and str(root / "big") in str(error)
        assert hidden(root) == []
        assert [c.name for c in list_checkpoints(root, verify="hash")] == ["step-1"]
        save(root, 3)  # freeing the space was enough
        return False
    assert read_folder(root / "big").bytes("f") == data
    return True


# children


def serve_kills() -> None:
    for line in sys.stdin:
        mode, root, at = json.loads(line)
        pid = os.fork()
        if not pid:

            def after(number, name, args, at=at):
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            change(mode, Path(root), Watched(after=after))
            os._exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)


def save_forever(root: str, first_step: str) -> None:
    step = int(first_step)
    while True:
        save(Path(root), step)
        print(step, flush=True)
        rotate(root, 2, owner="run-a")
        save(Path(root), step, name="last", overwrite=True)
        print(-step, flush=True)
        step += 1


def hold_lock(folder: str) -> None:
    with FolderLock(folder):
        print("held", flush=True)
        sys.stdin.read()


def execute(code: str, *args: str) -> None:
    exec(code, {"args": args, "sys": sys, "os": os})


CHILDREN = {"kill-server": serve_kills, "save-forever": save_forever, "hold-lock": hold_lock, "code": execute}

if __name__ == "__main__":
    CHILDREN[sys.argv[1]](*sys.argv[2:])

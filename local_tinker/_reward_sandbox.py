"""Rewards from running a completion's code: the parent's side of `_reward_child.py`."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class RunResult:
    """What became of a program.

    Args:
        passed: one flag a test.
        error: the program's own last error line, or why it did not finish; None when it ran through.
        timed_out: it was killed at the wall-clock limit.
        stdout, stderr: what it wrote, up to the output limit.
    """

    passed: tuple[bool, ...]
    error: str | None
    timed_out: bool
    stdout: str
    stderr: str


def run_python(
    code: str,
    *,
    tests: Sequence[str] = (),
    stdin: str = "",
    timeout: float = 5.0,
    memory_mb: int = 512,
    output_mb: int = 8,
) -> RunResult:
    """Run a Python program in a child process under limits, then each test in the program's namespace.

    The child runs in an empty temporary folder with an empty environment, in a process group that is killed at the
    end. Its address space, processor time and the size of any file it writes are limited. This keeps an accident from
    harming the trainer; it is not a security boundary: the program runs as this user and can reach files and network.

    Args:
        tests: statements (assertions, usually); one passes when it raises nothing.
        timeout: wall-clock seconds for everything.
        memory_mb: MiB of address space, the interpreter's own (about 20) included.

    Raises:
        UsageError: limits that cannot be, or a platform without them (Windows).
    """
    if os.name != "posix":
        raise UsageError("run_python limits its child with POSIX resource limits, which this platform lacks")
    for name, value in (("timeout", timeout), ("memory_mb", memory_mb), ("output_mb", output_mb)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UsageError(f"{name} must be a number > 0, got {value!r}")
    key = secrets.token_hex(16)
    request = {
        "key": key,
        "code": code,
        "tests": list(tests),
        "stdin": stdin,
        "memory_bytes": int(memory_mb * 2**20),
        "cpu_seconds": math.ceil(timeout) + 1,
        "output_bytes": int(output_mb * 2**20),
    }
    with tempfile.TemporaryDirectory(prefix="reward-", ignore_cleanup_errors=True) as folder:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as report:
            request["report_fd"] = report.fileno()
            status, timed_out = _child(request, folder, out, err, report.fileno(), timeout)
            stdout, stderr = (_read(file, int(output_mb * 2**20)) for file in (out, err))
            told = _read(report, 2**24)
    return _result(told, key, len(request["tests"]), status, timed_out, timeout, stdout, stderr)


def _child(request: dict, folder: str, out: Any, err: Any, report_fd: int, timeout: float) -> tuple[int, bool]:
    script = str(Path(__file__).with_name("_reward_child.py"))
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    child = subprocess.Popen(
        # -I also keeps this package's folder, which has a types.py, off the child's import path.
        [sys.executable, "-I", "-B", script],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        cwd=folder,
        env=environment,
        pass_fds=(report_fd,),
        start_new_session=True,
    )
    timed_out = False
    try:
        child.communicate(json.dumps(request).encode(), timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        # Its own children too, also when it ended well.
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
    return child.returncode, timed_out


def _read(file: Any, limit: int) -> str:
    file.seek(0)
    return file.read(limit).decode("utf-8", errors="replace")


def _result(
    told: str, key: str, tests: int, status: int, timed_out: bool, timeout: float, stdout: str, stderr: str
) -> RunResult:
    try:
        report = json.loads(told)
        assert report["key"] == key and len(report["errors"]) == tests
    except (ValueError, TypeError, KeyError, AssertionError):
        report = None
    if timed_out or report is None:
        ended = f"killed by signal {-status}" if status < 0 else f"ended by itself with status {status}"
        error = f"no end after {timeout:g} s" if timed_out else f"{ended} before its tests were done"
        return RunResult((False,) * tests, error, timed_out, stdout, stderr)
    passed = tuple(error is None for error in report["errors"])
    return RunResult(passed, report["error"], False, stdout, stderr)


def extract_code(completion: Any) -> Any:
    """The last fenced code block that is Python or unnamed, or the whole text when there is none."""

    def last(text: str) -> str:
        blocks = re.findall(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", text, flags=re.DOTALL | re.MULTILINE)
        found = [body for name, body in blocks if name.strip().lower() in ("", "python", "py", "python3")]
        return found[-1] if found else text

    if isinstance(completion, (list, tuple)):
        return [last(str(each)) for each in completion]
    return last(str(completion))


def unit_tests(
    completion: Any,
    tests: str | Sequence[str],
    *,
    timeout: float = 5.0,
    memory_mb: int = 512,
    workers: int | None = None,
) -> Any:
    """The share of tests that pass after the completion's code has run; see `run_python` for the limits.

    Args:
        tests: statements to run after it, e.g. ``["assert add(1, 2) == 3"]``; one string is one test.
        workers: children at a time over a group; the number of processors when None.
    """
    tests = [tests] if isinstance(tests, str) else list(tests)
    if not tests:
        raise UsageError("got no tests: give at least one statement, e.g. 'assert add(1, 2) == 3'")
    run = functools.partial(run_python, tests=tests, timeout=timeout, memory_mb=memory_mb)

    def score(each: Any) -> float:
        return sum(run(extract_code(each)).passed) / len(tests)

    if not isinstance(completion, (list, tuple)):
        return score(completion)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(score, completion))

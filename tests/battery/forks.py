"""Processes to kill: a server that has torch imported forks one for every job, at a tenth of the price of a new Python.

Nothing of ours is loaded in the server but modules, so a forked run knows what is on the disk and nothing else. As a
script this file is that server; `Forks` talks to it. A job is JSON: see `execute`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DISK = ("mkdir", "create", "open", "write", "fsync", "close", "fsync_dir", "rename", "replace", "unlink", "rmdir")
KILLED = -signal.SIGKILL


class Forks:
    """The server, as a context manager; `run` waits for one job and returns its exit code, negative for a signal."""

    def __enter__(self) -> Forks:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, argv: list[Any], *, log: Path, **job: Any) -> int:
        job = {"argv": [str(word) for word in argv], "log": str(log), **job}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server died"
        return os.waitstatus_to_exitcode(int(answer))


def serve() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import local_tinker.rewards
    import local_tinker.service
    import local_tinker.training  # noqa: F401
    from local_tinker.engine import local  # noqa: F401

    torch.set_num_threads(1)
    out = os.dup(1)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            execute(job)
        os.write(out, b"%d\n" % os.waitpid(pid, 0)[1])


def execute(job: dict[str, Any]) -> None:
    """`local-tinker argv`, in this process, and exit.

    Keys: `log` (output goes there), `kill` ([call, n]: SIGKILL right after the n-th call of it, or [seconds]), `stop`
    ([signal, call, n]: that signal instead), `trace` (a file that gets a line of facts a step), `final` (a folder for the
    state at the end), `count` (a file that gets the number of disk calls).
    """
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    code = 99
    try:
        if "trace" in job:
            _trace(job["trace"], job["final"])
        if "count" in job:
            calls = _count_disk_calls()
        if job.get("kill"):
            _arrange(signal.SIGKILL, job["kill"])
        if job.get("stop"):
            _arrange(signal.Signals[job["stop"][0]], job["stop"][1:])
        from local_tinker.cli import app

        code = app.main(job["argv"])
        if "count" in job:
            Path(job["count"]).write_text(str(len(calls)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _places() -> dict[str, list[tuple[type, str]]]:
    from local_tinker.checkpoint import Checkpoint, Disk
    from local_tinker.recipes.loop import Session
    from local_tinker.sampling import SamplingClient
    from local_tinker.training import TrainingClient

    return {
        "forward_backward": [(TrainingClient, "forward_backward")],
        "optim_step": [(TrainingClient, "optim_step")],
        "sample_batch": [(SamplingClient, "sample_batch")],
        "log": [(Session, "log")],
        "evaluation": [(Session, "_run_evaluation")],
        "load": [(Checkpoint, "bytes")],
        "disk": [(Disk, name) for name in DISK],
    }


def _arrange(number: int, when: list[Any]) -> None:
    """Send ourselves a signal right after the n-th call, or after some seconds."""
    if len(when) == 1:

        def later() -> None:
            time.sleep(when[0])
            os.kill(os.getpid(), number)

        threading.Thread(target=later, daemon=True).start()
        return
    place, at = when
    calls = [0]
    for owner, name in _places()[place]:
        real = getattr(owner, name)

        def call(self, *args, real=real, **kwargs):
            result = real(self, *args, **kwargs)
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), number)
            return result

        setattr(owner, name, call)


def _count_disk_calls() -> list[str]:
    from local_tinker.checkpoint import Disk

    calls: list[str] = []
    for name in DISK:
        real = getattr(Disk, name)

        def call(self, *args, real=real, name=name):
            calls.append(name)
            return real(self, *args)

        setattr(Disk, name, call)
    return calls


def _trace(path: str, final: str) -> None:
    """What a step saw, what it sampled and which log-probs came out; and all that is trained, at the end."""
    from local_tinker.recipes.loop import Session
    from local_tinker.sampling import SamplingClient

    sampled: list[Any] = []
    sample_batch, log, end = SamplingClient.sample_batch, Session.log, Session._end

    def sample(self, *args, **kwargs):
        made = sample_batch(self, *args, **kwargs)
        flat = [one for group in made for one in (group if isinstance(group, list) else [group])]
        sampled.extend(list(one.tokens) for one in flat)
        return made

    def traced(self, loss, step, **more):
        log(self, loss, step, **more)
        seen = {
            "step": self.step + 1,
            "rows": [repr(sorted(row.items())) for row in self._batch],
            "sampled": list(sampled),
            "logprobs": hashlib.sha256(b"".join(each.tobytes() for each in loss.logprobs)).hexdigest(),
        }
        sampled.clear()
        with open(path, "a") as file:
            file.write(json.dumps(seen) + "\n")

    def ended(self, status, cause):
        if status == "finished":
            self.trainer.save_state(final, overwrite=True, extra=self._extra())
        end(self, status, cause)

    SamplingClient.sample_batch, Session.log, Session._end = sample, traced, ended


if __name__ == "__main__":
    serve()

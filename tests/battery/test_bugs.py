"""Each seeded bug, planted in a copy of the tree, turns every one of its tests red."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bugs import ROOT, Bug, bugs

pytestmark = pytest.mark.battery


class Runner:
    """A Python with the heavy libraries imported, and nothing of ours, that forks one pytest a bug."""

    def __enter__(self) -> Runner:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, tree: Path, tests: tuple[str, ...], log: Path) -> int:
        self._process.stdin.write(json.dumps([str(tree), list(tests), str(log)]).encode() + b"\n")
        self._process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def runner():
    with Runner() as runner:
        yield runner


@pytest.mark.parametrize("bug", bugs(), ids=lambda bug: bug.id)
def test_a_seeded_bug_turns_its_tests_red(bug: Bug, runner, tmp_path):
    bug.plant(tmp_path / "tree")
    code = runner.run(tmp_path / "tree", bug.tests, tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert code == 1, said[-3000:]  # 2 and more: pytest itself failed, which proves nothing
    failed = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
    for name in bug.tests:
        # a failed import or fixture is an ERROR, and no proof either
        assert any(name in (each, each.split("[")[0]) for each in failed), f"{name} stayed green\n{said[-3000:]}"


def serve() -> None:
    import bitsandbytes  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    out = os.dup(1)
    for line in sys.stdin:
        tree, tests, log = json.loads(line)
        pid = os.fork()
        if not pid:
            file = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            os.chdir(tree)
            # the installed package is this very tree; the copy goes first, here and in processes that tests start
            sys.path[:] = [
                tree,
                *(each for each in sys.path if Path(each or ".").resolve() not in (ROOT, Path(__file__).parent)),
            ]
            for name in [each for each in sys.modules if each.split(".")[0] in ("tests", "local_tinker")]:
                del sys.modules[name]
            os.environ["PYTHONPATH"] = tree
            code = 99
            try:
                code = pytest.main(
                    [
                        "-q",
                        "--tb=line",
                        "-rf",
                        "-p",
                        "no:cacheprovider",
                        "-p",
                        "no:xdist",
                        f"--basetemp={tree}.tmp",
                        *tests,
                    ]
                )
            finally:
                sys.stdout.flush()
                os._exit(int(code))
        os.write(out, b"%d\n" % os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    serve()

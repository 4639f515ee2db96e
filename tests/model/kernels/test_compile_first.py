"""Gathering what a step launches; what a card compiles of it is tested in tests/gpu."""

import pytest
import torch

triton = pytest.importorskip("triton")

from local_tinker.model import kernels  # noqa: E402
from local_tinker.model.kernels.launch import Kernel  # noqa: E402


def add_rows(X, n, BLOCK):
    pass


@pytest.fixture
def launched(monkeypatch):
    asked = []

    def run(self, *args, grid, warmup, **options):
        asked.append((self.fn.__name__, warmup, options))
        return "compiled"

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return asked


@pytest.mark.parametrize("made", [kernels.Jit, Kernel])
def test_while_launches_are_gathered_they_compile_and_do_not_run(made, launched):
    kernel, x = made(add_rows), torch.zeros(4)
    gathered = []
    token = kernels._gathered.set(gathered)
    kernel[(1,)](x, 4, BLOCK=4)
    kernels._gathered.reset(token)
    assert gathered == ["compiled"] and [warmup for _, warmup, _ in launched] == [True]
    kernel[(1,)](x, 4, BLOCK=4)
    assert [warmup for _, warmup, _ in launched] == [True, False] and len(gathered) == 1
    token = kernels._gathered.set(gathered)  # also one that is known already
    kernel[(1,)](x, 4, BLOCK=4)
    kernels._gathered.reset(token)
    assert [warmup for _, warmup, _ in launched] == [True, False, True] and len(gathered) == 2


@pytest.mark.parametrize("made", [kernels.Jit, Kernel])
def test_the_promise_of_an_interrupted_compilation_is_kept_before_a_launch_remembers_it(made, monkeypatch):
    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: None

    class Promise:
        def result(self):
            return Compiled()

    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, **options: Promise())
    kernel, x = made(add_rows), torch.zeros(4)
    assert isinstance(kernel.run(x, 4, BLOCK=4, grid=(1,), warmup=False), Compiled)
    for _ in range(2):
        kernel[(1,)](x, 4, BLOCK=4)


def test_on_a_cpu_nothing_is_compiled_and_the_step_is_left_alone():
    kernels.compile_first(lambda: pytest.fail("run"), torch.device("cpu"))

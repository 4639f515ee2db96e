"""Kernels are compiled before they are launched, not instead."""

import pytest
import torch

from local_tinker.model.kernels import compile_first, jit, tl, triton

pytestmark = pytest.mark.gpu


@jit
def _add(X, n, value, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(X + at, tl.load(X + at, mask=at < n) + value, mask=at < n)


@jit
def _scale(X, n, value, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(X + at, tl.load(X + at, mask=at < n) * value, mask=at < n)


def test_a_step_is_compiled_without_running_and_then_runs_without_compiling(monkeypatch):
    x = torch.ones(50, device="cuda")

    def step():
        _add[(1,)](x, 50, 2.0, BLOCK=64)
        _scale[(1,)](x, 50, 5.0, BLOCK=64)
        _add[(1,)](x, 50, 2.0, BLOCK=64)

    compile_first(step, x.device)
    assert bool((x == 1).all())

    def compiled_again(*_, **__):
        raise AssertionError("a kernel was compiled twice")

    for kernel in (_add, _scale):
        monkeypatch.setattr(kernel, "compile", compiled_again)
    monkeypatch.setattr(triton.runtime.driver.active, "launcher_cls", compiled_again)
    step()
    assert bool((x == 17).all())


def test_an_error_of_the_step_is_raised_and_later_launches_run():
    x = torch.ones(50, device="cuda")

    def step():
        _add[(1,)](x, 50, 3, BLOCK=64)
        raise ValueError("of the step")

    with pytest.raises(ValueError, match="of the step"):
        compile_first(step, x.device)
    _add[(1,)](x, 50, 3, BLOCK=64)
    assert bool((x == 4).all())

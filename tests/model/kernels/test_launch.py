"""Which compiled kernel a launch takes, with a compiler that only counts."""

import pytest
import torch

triton = pytest.importorskip("triton")

from local_tinker.model.kernels.launch import Kernel  # noqa: E402


def scale_rows(X, OUT, n, factor, WIDTH, HALF):
    pass


class Compiled:
    def __init__(self, number, log):
        self.number, self.log = number, log

    def __getitem__(self, grid):
        return lambda *args: self.log.append((self.number, grid, args))


@pytest.fixture
def made(monkeypatch):
    kernel, compiled, launched = Kernel(scale_rows), [], []

    def run(*args, grid, warmup, **constants):
        assert not warmup and len(grid) == 1
        compiled.append((args, constants))
        return Compiled(len(compiled) - 1, launched)

    monkeypatch.setattr(kernel, "run", run)
    return kernel, compiled, launched


def test_a_second_launch_takes_the_compiled_kernel_with_constants_in_the_order_of_the_signature(made):
    kernel, compiled, launched = made
    x, other = torch.zeros(64), torch.ones(64)
    for tensor in (x, other):
        kernel[(3,)](tensor, tensor, 32, 0.5, HALF=True, WIDTH=64, num_warps=4)
    assert len(compiled) == 1 and len(launched) == 1
    number, grid, args = launched[0]
    assert (number, grid) == (0, (3, 1, 1))
    assert args[0] is other and args[2:] == (32, 0.5, 64, True)


@pytest.mark.parametrize(
    "change",
    [
        dict(n=33),  # no multiple of 16
        dict(n=1),
        dict(n=2**31),
        dict(x=torch.zeros(64, dtype=torch.bfloat16)),
        dict(x=torch.zeros(65)[1:]),  # not at 16 bytes
        dict(WIDTH=128),
        dict(num_warps=8),
    ],
)
def test_what_a_kernel_is_compiled_for_is_told_apart(made, change):
    kernel, compiled, launched = made

    def launch(x=None, n=32, WIDTH=64, num_warps=4):
        x = torch.zeros(64) if x is None else x
        kernel[(1,)](x, x, n, 0.5, WIDTH=WIDTH, HALF=True, num_warps=num_warps)

    launch()
    launch(**change)
    launch()
    launch(**change)
    assert len(compiled) == 2 and [number for number, *_ in launched] == [0, 1]


def test_a_value_of_the_same_kind_is_passed_on_and_not_remembered(made):
    kernel, compiled, launched = made
    for n, factor in ((32, 0.5), (48, 0.25), (64, 3.0)):
        kernel[(1,)](torch.zeros(4), torch.zeros(4), n, factor, WIDTH=64, HALF=False)
    assert len(compiled) == 1 and [args[2:4] for _, _, args in launched] == [(48, 0.25), (64, 3.0)]

"""Launching a Triton kernel again in half the time.

Before every launch Triton works out how each argument specialises the kernel, makes a string of it, looks for the
compiled kernel under that and reads its settings: 24 microseconds beside a card, more with many arguments, where a layer
has 25 to 34 such launches and the card may wait for them. `Kernel` remembers which compiled kernel arguments like these
led to, which leaves 12.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from . import jit_as, triton

_INT32 = 2**31


def _kind(value: Any) -> Any:
    """What of a run-time argument a compiled kernel depends on: Triton tells apart pointers to 16 bytes, integers that
    are 1 or multiples of 16, and those that need 64 bits."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return (value == 1) + 2 * (value % 16 == 0) + 4 * (not -_INT32 <= value < _INT32)
    return type(value)


if triton is not None:
    from . import Jit, gathering

    class Kernel(Jit):
        """A kernel whose run-time arguments come first and by position, its constants and options by name."""

        def __init__(self, function: Callable, **options: Any) -> None:
            super().__init__(function, **options)
            self._known: dict[tuple, tuple[Any, tuple]] = {}

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return partial(self._launch, grid)

        def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
            key = (args[0].get_device(), *map(_kind, args), *constants, *constants.values())
            known = self._known.get(key)
            if known is None or gathering() is not None:
                compiled = self.run(*args, grid=grid, warmup=False, **constants)
                if compiled is not None:  # it is None while launches are gathered
                    self._known[key] = compiled, tuple(constants[name] for name in self.arg_names[len(args) :])
            else:
                compiled, values = known
                compiled[(*grid, 1, 1)[:3]](*args, *values)


def kernel(function: Callable | None = None, **options: Any) -> Callable:
    """triton.jit for what the host launches."""
    return partial(kernel, **options) if function is None else jit_as(Kernel, function, **options)

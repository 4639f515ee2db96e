"""Whether two ways through a decoder compute the same, judged layer by layer.

Rounding grows through a deep model: in bf16 two right answers differ by 2 % after 16 layers and by 6 % after 32, as much as
a small mistake. So every layer is given the same input, and what it makes of that is compared.

Shapes: N packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

SMALL = 1 / 16  # of the residual stream: a layer that adds less is judged against this much, for its sum is rounded
TINY = 1e-20  # a padding token may be all zeros and stay so


@dataclass(frozen=True, eq=False)
class Seen:
    """What the layers of a decoder were given (N, H) and made of it, and its final hidden states (N, H)."""

    given: tuple[Tensor, ...]
    made: tuple[Tensor, ...]
    final: Tensor


def watch(layers: Sequence[nn.Module], runs: Sequence[Callable[[], Tensor]], forced: Seen | None = None) -> Seen:
    """Run a transformers decoder, once a document or once for all of them.

    Args:
        runs: each gives final hidden states, of which there are one after the other.
        forced: each layer takes what that one was given, instead of what the layer before made; for one run.

    Raises:
        ModelError: the decoder runs a layer not at all, or several times.
    """
    given: list[list[Tensor]] = [[] for _ in layers]
    made: list[list[Tensor]] = [[] for _ in layers]

    def before(index: int) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            states = args[0] if args else kwargs["hidden_states"]
            given[index].append(states[0])
            if forced is None or len(given[index]) > 1:
                return args, kwargs
            instead = forced.given[index].view_as(states)
            return ((instead, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": instead})

        return hook

    def after(index: int) -> Callable:
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            made[index].append((output[0] if isinstance(output, tuple) else output)[0])

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after(index)).remove)
        final = torch.cat([run() for run in runs])
    for index, seen in enumerate(made):
        if len(seen) != len(runs):
            raise ModelError(f"layer {index} of its decoder runs {len(seen)} times in {len(runs)} passes")
    return Seen(tuple(map(torch.cat, given)), tuple(map(torch.cat, made)), final)


def largest_gap(ours: Seen, theirs: Seen) -> float:
    """The largest difference of a part, relative to what that part does: what goes into the first layer, what each layer
    adds to the same input, and the final hidden states. Waits for the device."""
    layers = map(layer_gap, theirs.given, ours.made, theirs.made)
    return max_of(relative_gap(ours.given[0], theirs.given[0]), *layers, relative_gap(ours.final, theirs.final))


def layer_gap(given: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs - given| of each token, Euclidean norms over H; the root of its mean square."""
    wide = torch.promote_types(theirs.dtype, torch.float32)
    given, ours, theirs = (t.detach().to(wide) for t in (given, ours, theirs))
    added = torch.maximum((theirs - given).norm(dim=1), SMALL * theirs.norm(dim=1)).clamp_min(TINY)
    return float(((ours - theirs).norm(dim=1) / added).square().mean().sqrt())


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, Frobenius norms; waits for the device."""
    wide = torch.promote_types(theirs.dtype, torch.float32)
    ours, theirs = ours.detach().to(wide), theirs.detach().to(wide)
    return float((ours - theirs).norm() / theirs.norm().clamp_min(TINY))


def max_of(*gaps: float) -> float:
    """The largest; not a number when one of them is not."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())

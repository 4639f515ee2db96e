"""A LoRA adapter: fp32 masters in one flat buffer, with a copy in the compute type for the projections.

An adapter kept in bf16 swallows updates smaller than half a unit in the last place (a weight of 1.0 does not move at
learning rate 1e-4), so masters, gradients and moments are fp32 (fp64 when the compute type is).

Shapes: R rank, I inputs, O outputs, P parameters of the whole adapter.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError
from .lora import LoraPair

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, apart from its values.

    Args:
        rank, alpha: the update is (alpha / rank) B A.
        shapes: module path -> (O, I), in the model's order.
        dropout: on the adapter's input while training.
        seed: of the initial values.
    """

    rank: int
    alpha: float
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    dropout: float = 0.0
    seed: int = 42

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self.shapes)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def numel(self) -> int:
        return sum(self.rank * (o + i) for _, (o, i) in self.shapes)


def choose_targets(available: Sequence[str], wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Module paths to adapt. `wanted`: "all-linear", or names such as ["q_proj", "v_proj"] or full paths.

    Raises:
        UsageError: a name that matches no projection, with the names there are.
    """
    if wanted == "all-linear":
        return tuple(available)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for name in names:
        found = {path for path in available if path == name or path.endswith("." + name)}
        if not found:
            kinds = sorted({path.rsplit(".", 1)[-1] for path in available})
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UsageError(f"target module {name!r} matches nothing in this model{hint} It has: {', '.join(kinds)}")
        chosen |= found
    return tuple(path for path in available if path in chosen)


class Adapter:
    """The values of one adapter.

    Attributes:
        master: (P,) fp32 or fp64.
        compute: (P,) in the compute type; the same tensor as `master` when the types agree.
    """

    def __init__(self, spec: AdapterSpec, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.spec, self.dtype = spec, dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.master = torch.zeros(spec.numel, dtype=wide, device=device)
        self.compute = self.master if dtype == wide else torch.zeros(spec.numel, dtype=dtype, device=device)

    def initialise(self) -> None:
        """A ~ U(-1/sqrt(I), 1/sqrt(I)), B = 0 (PEFT's default: Kaiming uniform with a = sqrt 5), from the spec's own seed."""
        generator = torch.Generator().manual_seed(self.spec.seed)
        for a, b in self.views(self.master).values():
            bound = 1.0 / math.sqrt(a.shape[1])
            values = torch.rand(a.shape, generator=generator, dtype=torch.float32) * (2 * bound) - bound
            a.copy_(values)
            b.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Bring the compute copy up to the masters."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def views(self, flat: Tensor) -> dict[str, LoraPair]:
        """The pairs of a flat buffer laid out like this adapter, as views: every A in the model's order, then every B.

        So the A's of projections that read the same input lie on top of each other, and one product serves them all.
        """
        r, shapes = self.spec.rank, self.spec.shapes
        a_sizes, b_sizes = [r * i for _, (_, i) in shapes], [o * r for _, (o, _) in shapes]
        parts = flat.split([*a_sizes, *b_sizes])
        return {
            path: (a.view(r, i), b.view(o, r))
            for (path, (o, i)), a, b in zip(shapes, parts[: len(shapes)], parts[len(shapes) :], strict=True)
        }

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """PEFT's names (without its adapter name) -> views of a flat buffer."""
        named = {}
        for path, (a, b) in self.views(flat).items():
            named[f"{PEFT_PREFIX}{path}.lora_A.weight"] = a
            named[f"{PEFT_PREFIX}{path}.lora_B.weight"] = b
        return named

    def load(self, flat: Tensor, tensors: Mapping[str, Tensor], *, what: str) -> None:
        """Fill a flat buffer from tensors by PEFT name; every name must be there, no other may be, shapes must agree."""
        named = self.named(flat)
        missing, extra = sorted(named.keys() - tensors.keys()), sorted(tensors.keys() - named.keys())
        if missing or extra:
            raise CheckpointError(
                f"{what}: {_some('missing', missing)}{'; ' if missing and extra else ''}{_some('not expected', extra)}"
            )
        for name, view in named.items():
            if tensors[name].shape != view.shape:
                raise CheckpointError(
                    f"{what}: {name} has shape {tuple(tensors[name].shape)}, this adapter's is {tuple(view.shape)}"
                )
        for name, view in named.items():
            view.copy_(tensors[name])


def _some(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} tensors {what} (first: {names[0]})" if names else ""

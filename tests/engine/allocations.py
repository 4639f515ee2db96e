"""What a training pass allocates on a card, counted without one: the real code on tensors without memory.

Kernels launch nothing; allocations and releases are those of a card. Copies to the host count as finished at once.
"""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from local_tinker.engine.footprint import Choice, TrainSettings
from local_tinker.model import attention, kernels, layer
from local_tinker.model import group as group_module
from local_tinker.model.attention import VarlenCausal
from local_tinker.model.dims import ModelDims
from local_tinker.model.group import ProjectionGroup
from local_tinker.model.head import Head, target_logprobs
from local_tinker.model.kernels.packed_blocks import PackedBlocks
from local_tinker.model.kernels.rope import HeadLayout
from local_tinker.model.layer_parts import LayerWeights
from local_tinker.model.linear import FrozenLinear
from local_tinker.model.road import FastRoad, RoadWeights
from local_tinker.model.rope import Rope
from local_tinker.model.spec import FamilySpec

BF16 = torch.bfloat16


class Counter(TorchDispatchMode):
    """Bytes alive on the card, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._users: dict[int, int] = {}
        self._older: set[int] = set()  # storages that were there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._older.update(key for key in given if key not in self._users)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._older:
            return
        if key not in self._users:
            self._users[key] = 0
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._users[key] += 1
        weakref.finalize(tensor, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.alive -= size


class _Silent:
    """Takes the place of a compiled kernel."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


class _Fast4Bit:
    """Stands for NF4 storage: what dequantising allocates, nothing else."""

    kind = "nf4"

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.stored = torch.empty(0, dtype=torch.uint8, device="meta")

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")

    def dense_into(self, out: Tensor) -> None:
        pass

    def tensors(self) -> list[Tensor]:
        return [self.stored]


class _Parked:
    """A hidden state in host memory, whose copies take no time."""

    def __init__(self, tensor: Tensor, stream) -> None:
        self._shape, self._back = tensor.shape, None

    def leave(self) -> None:
        pass

    def fetch(self) -> None:
        if self._back is None:
            self._back = torch.empty(self._shape, dtype=BF16, device="meta")

    def get(self) -> Tensor:
        self.fetch()
        return self._back


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A product of half precision in fp32, which only a card has."""
    return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device="meta")


@contextmanager
def _card() -> Iterator[None]:
    """Everything believes in a card with kernels."""
    with ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            module = importlib.import_module(found.name)
            for name, value in vars(module).copy().items():
                if isinstance(value, kernels.triton.JITFunction):
                    patch(module, name, _Silent())
        patch(kernels, "fault", lambda kind: None)
        patch(ProjectionGroup, "fusable", True)
        patch(group_module, "_product", _wide_product)
        patch(group_module, "_add_product", lambda target, a, b, scale=1.0: None)  # on a card in place
        patch(Head, "raw", lambda self, h, *_: _wide_product(h, self.weight.t()))
        patch(PackedBlocks, "of", lambda self, size, *, keys: torch.empty(4, 6, dtype=torch.int32))
        patch(layer, "Parked", _Parked)
        patch(layer.DecoderPass, "_park", lambda self, h: _Parked(h, None))
        assert attention.attention_kernel(torch.device("meta"), BF16, 128, None) == "packed"
        yield


def _linear(i: int, o: int, path: str) -> FrozenLinear:
    linear = FrozenLinear(torch.empty(o, i, dtype=BF16, device="meta"), None, quantize=None, dtype=BF16, path=path)
    linear.store = _Fast4Bit((o, i))
    linear.weight = torch.nn.Parameter(linear.store.stored, requires_grad=False)
    return linear


def _layer(dims: ModelDims, index: int) -> LayerWeights:
    def group(*names: str) -> ProjectionGroup:
        paths = tuple(f"layers.{index}.{name}" for name in names)
        return ProjectionGroup(
            paths, tuple(_linear(*dims.projections[name], path) for name, path in zip(names, paths, strict=True))
        )

    norm = torch.empty(dims.hidden, dtype=BF16, device="meta")
    return LayerWeights(
        group("q_proj", "k_proj", "v_proj"),
        group("o_proj"),
        group("gate_proj", "up_proj"),
        group("down_proj"),
        norm,
        None,
        norm,
        None,
        HeadLayout(dims.heads, dims.kv_heads, dims.head_dim),
    )


def _road(dims: ModelDims) -> FastRoad:
    spec = FamilySpec(
        family="llama",
        layers=dims.layers,
        hidden=dims.hidden,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        activation="silu",
        norm_eps=1e-5,
        windows=(None,) * dims.layers,
        ropes=("default",) * dims.layers,
        attention_scale=dims.head_dim**-0.5,
    )
    rope = Rope("default", torch.empty(dims.head_dim // 2, device="meta"), 1.0)
    embedding = torch.empty(dims.vocab, dims.hidden, dtype=BF16, device="meta")
    norm = torch.empty(dims.hidden, dtype=BF16, device="meta")
    return FastRoad(
        spec, RoadWeights(embedding, tuple(_layer(dims, i) for i in range(dims.layers)), norm, {"default": rope})
    )


def traced_peak(dims: ModelDims, settings: TrainSettings, choice: Choice, documents: Sequence[int]) -> int:
    """Bytes at the peak of one micro-batch's forward and backward, beside what stands all the time."""
    tokens, rank = sum(documents), settings.rank
    edges = [sum(documents[:i]) for i in range(len(documents) + 1)]
    with _card():
        road = _road(dims)
        head = Head(torch.empty(dims.vocab, dims.hidden, dtype=BF16, device="meta"))
        shapes = {path: (li.in_features, li.out_features) for path, li in _linears(road)}
        pairs, sink = (
            {
                path: (
                    torch.empty(rank, i, dtype=dtype, device="meta"),
                    torch.empty(o, rank, dtype=dtype, device="meta"),
                )
                for path, (i, o) in shapes.items()
            }
            for dtype in (BF16, torch.float32)
        )
        ids, positions = (torch.empty(tokens, dtype=torch.int64, device="meta") for _ in range(2))
        for each in road.weights.layers[: choice.resident_layers]:
            for group in each.groups:
                group.hold(rank * len(group.linears))
        counter = Counter()
        with counter:
            hidden = road.hidden(
                ids,
                positions=positions,
                attend=VarlenCausal(edges, "meta"),
                pairs=pairs,
                scale=2.0,
                levels=choice.levels,
                sink=sink,
                tile=choice.tile,
            )
            logprobs, _ = target_logprobs(hidden, head, ids, chunk=choice.head_rows)
            total = logprobs.sum()
            del hidden, logprobs
            total.backward()
    return counter.peak


def _linears(road: FastRoad):
    for each in road.weights.layers:
        for group in each.groups:
            yield from zip(group.paths, group.linears, strict=True)

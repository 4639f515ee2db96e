"""How the model runs for the sampler: contexts through the road, decoding steps through fused kernels where they serve.

Shapes: N packed tokens, B decoding rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..model.attention import VarlenCausal
from ..model.decode import DecodeRoad
from ..model.kernels import compile_first
from ..model.kernels.draw import RowState
from ..model.kernels.paged import PagedRows
from ..model.linear import project
from .kv_cache import DecodeAttend, KVCache, PromptAttend
from .rows import upload
from .scheduler import Piece


class Road(Protocol):
    """The model's forward over packed tokens, see `model.layer`."""

    def hidden(self, tokens: Tensor, *, positions: Tensor, attend: Any, pairs: Mapping, scale: float) -> Tensor: ...


class Head(Protocol):
    """Hidden states (N, H) -> fp32 logits (N, V); `pair` is the head's own adapter, see `model.head`."""

    def logits(self, hidden: Tensor, pair: Any, lora_scale: float, product: Callable) -> Tensor: ...


class Forward:
    """One model with one adapter at a time.

    Attributes:
        packed: whether a cache can be continued; otherwise every text runs from its start each step.
        fused: the decoding step of the fast road, or None: then steps go through the road as contexts do.
        version: of what a captured step has baked in.
        group: query heads a key head.
    """

    def __init__(
        self, road: Road, head: Head, *, head_path: str, group: int = 1, fused: DecodeRoad | None = None
    ) -> None:
        self._road, self._head, self._head_path = road, head, head_path
        self.group, self.fused = group, fused
        self.packed = getattr(road, "packed", True)
        self._pairs: Mapping = {}
        self._body: Mapping = {}
        self._scale = 1.0
        self._head_pair: Any = None
        self._bound = False
        self._head_version = 0
        self._compiled: set[Hashable] = set()

    @property
    def version(self) -> tuple[int, int]:
        return (self.fused.version if self.fused is not None else 0), self._head_version

    def bind(self, pairs: Mapping, scale: float, *, anew: bool = False) -> None:
        """Run with this adapter from now on. Values are taken over once; the same mapping again costs nothing, unless
        `anew`, when the base may have been laid out otherwise since."""
        same = self._bound and pairs is self._pairs and scale == self._scale and not anew
        if same and (self.fused is None or self.fused.current):
            return
        self._pairs, self._scale, self._bound = pairs, scale, True
        self._body = {path: pair for path, pair in pairs.items() if path != self._head_path}
        if self.fused is not None:
            self.fused.bind(self._body, scale)
        self._bind_head(pairs.get(self._head_path))

    def unbind(self) -> None:
        """Let the adapter's memory go."""
        self._pairs, self._body, self._head_pair, self._bound = {}, {}, None, False
        if self.fused is not None:
            self.fused.release()

    def _bind_head(self, pair: Any) -> None:
        old = self._head_pair
        if pair is None or old is None or any(a.shape != b.shape for a, b in zip(pair, old, strict=True)):
            self._head_pair = None if pair is None else tuple(t.clone() for t in pair)
            self._head_version += pair is not None or old is not None
            return
        for to, source in zip(old, pair, strict=True):
            to.copy_(source)

    def context(self, pieces: Sequence[Piece], cache: KVCache) -> Tensor:
        """Hidden states (N, H) of pieces of contexts, one after the other; their keys go to the cache."""
        tokens = [token for piece in pieces for token in piece.owner.context[piece.start : piece.stop]]
        positions = [np.arange(p.start, p.stop) + p.owner.offset for p in pieces]
        tokens, positions = upload(np.stack([np.array(tokens), np.concatenate(positions)]), cache.device)
        attend = PromptAttend(cache, pieces)
        run = partial(
            self._road.hidden, tokens, positions=positions, attend=attend, pairs=self._body, scale=self._scale
        )
        self.compile_once("contexts", run, cache.device)
        return run()

    def compile_once(self, what: Hashable, run: Callable[[], Any], device: torch.device) -> None:
        """Compile the kernels that `run` launches, the first time it is told of this; see `compile_first`."""
        if what not in self._compiled:
            compile_first(run, device)
            self._compiled.add(what)

    def texts(self, texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Hidden states (N, H) of whole texts, without a cache: right for any model, slow for long ones."""
        edges = [0, *accumulate(map(len, texts))]
        return self._road.hidden(
            upload(np.array([token for text in texts for token in text]), device),
            positions=upload(np.concatenate([np.arange(len(text)) for text in texts]), device),
            attend=VarlenCausal(edges, device),
            pairs=self._body,
            scale=self._scale,
        )

    def step(self, state: RowState, cache: KVCache, rows: PagedRows) -> Tensor:
        """Logits (B, V) after each row's newest token."""
        if self.fused is not None:
            hidden = self.fused.hidden(state.token, state.position, cache.keys, cache.values, rows)
        else:
            hidden = self._road.hidden(
                state.token,
                positions=state.position,
                attend=DecodeAttend(cache, rows),
                pairs=self._body,
                scale=self._scale,
            )
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._head.logits(hidden, self._head_pair, self._scale, project)
        return logits if logits.dtype == torch.float64 else logits.float()

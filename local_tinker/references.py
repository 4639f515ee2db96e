"""Reference log-probs kept by content, for preference data that is seen more than once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .engine.base import Scores, Unit
from .types import Datum

REMEMBERED = 262_144  # datums; past it the oldest go


class ReferenceCache:
    """Log-probs of the reference by the datum's own tokens and weights, so neither order nor file matters.

    One cache belongs to one trainer, whose reference never changes. A cached log-prob was computed over another cut into
    micro-batches: in bf16 it differs by rounding from one computed beside the policy's, and the first loss of a fresh
    adapter is ln 2 only to that rounding.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def add(self, units: Sequence[Unit], score: Callable[..., Scores]) -> list[Unit]:
        """The units with a field `reference_logprobs`; only unseen datums are computed."""
        keys = [_key(datum) for unit in units for datum in unit]
        unseen = {
            key: datum
            for key, datum in zip(keys, (d for unit in units for d in unit), strict=True)
            if key not in self._kept
        }
        if unseen:
            found = score([(datum,) for datum in unseen.values()], reference=True).reference_logprobs
            self._kept.update(zip(unseen, found, strict=True))
            while len(self._kept) > max(REMEMBERED, len(keys)):
                self._kept.popitem(last=False)
        at = iter(keys)
        return [tuple(_with_reference(datum, self._kept[next(at)]) for datum in unit) for unit in units]


def _with_reference(datum: Datum, logprobs: np.ndarray) -> Datum:
    return replace(datum, loss_fn_inputs={**datum.loss_fn_inputs, "reference_logprobs": logprobs})


def _key(datum: Datum) -> bytes:
    sha = hashlib.sha256(np.asarray(datum.model_input.to_ints(), np.int64).tobytes())
    for name in ("target_tokens", "weights"):
        if name in datum.loss_fn_inputs:
            sha.update(name.encode() + datum.loss_fn_inputs[name].tobytes())
    return sha.digest()

"""Filters of what may be drawn: top-k, top-p and min-p as a mask over logits.

Shapes: F rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.kernels.draw import GREEDY_BELOW, RowState

NO_TOP_K = torch.iinfo(torch.int64).max
_ONE = 2**44  # the most likely token's weight as a whole number: 2**18 of them stay below 2**63
_CELLS = 2**24  # logits worked on at a time: bounds the running sums at 128 MiB


def kept_logits(logits: Tensor, state: RowState) -> Tensor:
    """Logits (F, V) with -inf where the row's filters leave a token out; a row without filters stays whole.

    In the order of Hugging Face: temperature, top_k, top_p over what top_k left (renormalised), min_p against the most
    likely token. Exactly k tokens stay: equal probabilities rank by token id.
    """
    rows = max(1, _CELLS // logits.shape[1])
    parts = []
    for begin in range(0, logits.shape[0], rows):
        cut = slice(begin, begin + rows)
        settings = (t[cut, None] for t in (state.temperature, state.top_k, state.top_p, state.min_p))
        parts.append(_filter(logits[cut], *settings))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _filter(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    # fp32 is exact enough for one weight (relative error 1e-7); a sum over 1e5 of them is not. Whole numbers add up to the
    # same in any order, so torch's deterministic mode lets a card sum them.
    weights = ((ordered - ordered[:, :1]) / temperature.clamp_min(GREEDY_BELOW)).exp_()
    rank = torch.arange(logits.shape[1], device=logits.device)
    weights.masked_fill_(rank >= top_k, 0.0)
    whole = (weights.double() * _ONE).long()
    mass = whole.cumsum(dim=-1)
    before = mass - whole
    # The token that carries the sum over top_p stays; at top_p = 1 rounding must not drop the tail.
    keep = ((before < top_p * mass[:, -1:]) | (top_p >= 1)) & (weights >= min_p) & (rank < top_k)
    return torch.full_like(logits, -torch.inf).scatter_(1, order, ordered.masked_fill(~keep, -torch.inf))

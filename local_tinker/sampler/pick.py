"""Logits -> tokens and log-probs. A draw depends on (seed, position, logits row) alone, no batch, no global RNG.

Shapes: B rows, V vocabulary, F rows with filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sequence import SamplingParams

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GREEDY_BELOW = 1e-6  # there a logit gap of 1e-4 already weighs e^-100; dividing fp32 by less overflows
_CELLS = 2**24  # logits worked on at a time: bounds the fp64 running sums at 128 MiB


def philox_4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).

    Args:
        counter: four int64 tensors of 32-bit words. key: two of them. All broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products of two 32-bit words wrap like unsigned ones; the mask drops the sign the shift brings in.
        low = _MULTIPLIERS[0] * c0
        high = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Seeds (B,) and positions (B,), int64 -> (B,) float64 in [0, 1) with 53 random bits."""
    zero = torch.zeros_like(positions)
    counter = (positions & _MASK, (positions >> 32) & _MASK, zero, zero)
    first, second, _, _ = philox_4x32(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    return ((first >> 5) * 2**26 + (second >> 6)).double() * 2.0**-53


@dataclass(frozen=True)
class PickSettings:
    """Sampling settings of B rows as tensors; built when the rows change, so that a step asks the host nothing.

    Attributes:
        temperature, top_p, min_p: (B,) float32. top_k: (B,) int64, the largest integer where off.
        filtered: (F,) rows where some filter is on, as host integers.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    filtered: tuple[int, ...]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], *, device: torch.device | str) -> PickSettings:
        off = torch.iinfo(torch.int64).max
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k or off for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            filtered=tuple(row for row, p in enumerate(params) if p.filtered),
        )


def pick(logits: Tensor, uniform: Tensor, settings: PickSettings) -> tuple[Tensor, Tensor]:
    """Logits (B, V) and uniforms (B,) -> tokens (B,) int64 and their log-probs (B,) fp32.

    Log-probs are those of softmax(logits), whatever the settings: what a trainer computes for the token. The draw
    inverts the running sum of the processed distribution, in order of token id. Filters in the order of Hugging Face:
    temperature, top_k, top_p over what top_k left (renormalised), min_p against the most likely token. Exactly k tokens
    stay: equal probabilities rank by token id.
    """
    rows = max(1, _CELLS // logits.shape[1])
    parts = []
    for begin in range(0, logits.shape[0], rows):
        cut = slice(begin, begin + rows)
        filtered = [row - begin for row in settings.filtered if begin <= row < begin + rows]
        part = PickSettings(
            settings.temperature[cut], settings.top_k[cut], settings.top_p[cut], settings.min_p[cut], tuple(filtered)
        )
        parts.append(_pick_rows(logits[cut].float(), uniform[cut], part))
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _pick_rows(logits: Tensor, uniform: Tensor, settings: PickSettings) -> tuple[Tensor, Tensor]:
    full = torch.log_softmax(logits, dim=-1)  # (B, V)
    peak, best = full.max(dim=-1, keepdim=True)  # (B, 1)
    temperature = settings.temperature[:, None]
    # fp32 is exact enough for one weight (relative error 1e-7); a sum over 1e5 of them is not, hence fp64 below.
    weights = ((full - peak) / temperature.clamp_min(_GREEDY_BELOW)).exp_()
    if settings.filtered:
        rows = torch.tensor(settings.filtered, device=logits.device)
        weights[rows] = _filter(weights[rows], settings, rows)
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1:]
    # u < 1, but u * total may round up to total, where no token lies.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(mass, target, right=True).clamp_max(logits.shape[1] - 1)
    token = torch.where(temperature <= _GREEDY_BELOW, best, drawn)
    return token[:, 0], full.gather(1, token)[:, 0]


def _filter(weights: Tensor, settings: PickSettings, rows: Tensor) -> Tensor:
    """Weights (F, V), the largest of a row being 1 -> the same with the left-out tokens at 0."""
    top_k, top_p, min_p = (t[rows][:, None] for t in (settings.top_k, settings.top_p, settings.min_p))
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    ordered = ordered.masked_fill(rank >= top_k, 0.0)
    mass = ordered.cumsum(dim=-1, dtype=torch.float64)
    before = mass - ordered
    # The token that carries the sum over top_p stays; at top_p = 1 rounding must not drop the tail.
    keep = ((before < top_p * mass[:, -1:]) | (top_p >= 1)) & (ordered >= min_p * ordered[:, :1])
    return torch.zeros_like(weights).scatter_(1, order, ordered * keep)

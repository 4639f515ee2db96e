"""Logits -> tokens and log-probs: exact draws by the Gumbel-max trick over blocks of the vocabulary.

A token is drawn in two levels (Maddison et al., "A* sampling", arXiv 1411.0030): a block of `BLOCK` ids with the
probability of its mass, then a token of that block. Noise is Philox4x32-10 (Salmon et al., SC11) with the request's seed
as key and (index, drawn token's number, level) as counter, so a draw depends on (seed, position, logits) alone. Two
levels need a thousandth of the random numbers of one level and read the logits once.

Shapes: B rows, V vocabulary, K blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import jit, power_of_two, tl, triton_ready
from .dependent import dependent, follow

BLOCK = 1024
GREEDY_BELOW = 1e-6  # there a logit gap of 1e-4 already weighs e^-100; dividing fp32 by less overflows
_BLOCKS_A_PROGRAM = 4
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TOKEN, _BLOCK_LEVEL = 0, 1  # third word of the counter


@dataclass(frozen=True)
class Noise:
    """What keys a row's draw: seed (B,) int64, number (B,) int32 of the token within its sample, temperature (B,) fp32."""

    seed: Tensor
    number: Tensor
    temperature: Tensor


def draw(logits: Tensor, noise: Noise, *, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, V) fp32 or fp64 -> tokens (B,) int64 and their log-probs (B,).

    Args:
        kept: (B, V) fp32 logits with -inf where a filter left a token out; None draws from all. Log-probs are those of
            softmax(logits) whatever the temperature and the filters. At temperature 0 the lowest id of the largest logit.
    """
    if triton_ready(logits.device.type) and logits.dtype == torch.float32:
        return _draw_triton(logits, noise, kept)
    return draw_reference(logits, noise, kept=kept)


def draw_reference(logits: Tensor, noise: Noise, *, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, on any device."""
    source = logits if kept is None else kept
    greedy = noise.temperature <= GREEDY_BELOW
    mass = _block_mass(logits)  # (B, K)
    normaliser = mass.logsumexp(-1)
    # A CPU may look at the settings to leave out what nobody asked for; on a card looking would wait.
    on_cpu = logits.device.type == "cpu"
    token = None
    if not on_cpu or bool(greedy.any()):
        token = source.argmax(-1)
    if not on_cpu or not bool(greedy.all()):
        inverse = torch.where(greedy, 1.0, 1.0 / noise.temperature.clamp_min(GREEDY_BELOW)).to(source.dtype)[:, None]
        if not (on_cpu and kept is None and bool((inverse == 1.0).all())):
            mass = _block_mass(source * inverse)
        drawn = _draw_blocks(source, mass, noise, inverse)
        token = drawn if token is None else torch.where(greedy, token, drawn)
    return token, logits.gather(1, token[:, None])[:, 0] - normaliser


def _block_mass(logits: Tensor) -> Tensor:
    """(B, V) -> log-sum-exp of each block (B, K)."""
    rows, vocab = logits.shape
    whole = vocab // BLOCK * BLOCK
    mass = [logits[:, :whole].reshape(rows, -1, BLOCK).logsumexp(-1)] if whole else []
    if whole < vocab:
        mass.append(logits[:, whole:].logsumexp(-1, keepdim=True))
    return mass[0] if len(mass) == 1 else torch.cat(mass, 1)


def _draw_blocks(source: Tensor, mass: Tensor, noise: Noise, inverse: Tensor) -> Tensor:
    vocab = source.shape[1]
    if mass.shape[1] == 1:
        block = torch.zeros_like(noise.seed)
    else:
        blocks = torch.arange(mass.shape[1], device=source.device)
        block = (mass + gumbel(noise.seed, noise.number, blocks, level=_BLOCK_LEVEL).to(mass.dtype)).argmax(-1)
    ids = block[:, None] * BLOCK + torch.arange(min(BLOCK, vocab), device=source.device)  # (B, BLOCK or V)
    values = source.gather(1, ids.clamp_max(vocab - 1)) * inverse
    within = values + gumbel(noise.seed, noise.number, ids, level=_TOKEN).to(values.dtype)
    return ids.gather(1, within.masked_fill(ids >= vocab, -torch.inf).argmax(-1, keepdim=True))[:, 0]


def gumbel(seed: Tensor, number: Tensor, index: Tensor, *, level: int) -> Tensor:
    """Standard Gumbel noise (B, J) fp32 for seed (B,), number (B,) and index (J,) or (B, J)."""
    counter = [index.expand(seed.shape[0], index.shape[-1]), number.long()[:, None]]
    key = [(seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None]]
    if seed.device.type == "cpu":  # the same integer arithmetic, with a fifth of the overhead an operation
        counter, key = [t.numpy() for t in counter], [t.numpy() for t in key]
    first, *_ = philox_4x32((*counter, level, 0), key)
    first = torch.as_tensor(first)
    # float() of the integer first: the kernel rounds there too.
    u = (first.float() + 0.5) * 2.0**-32
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    wait = torch.where(u < 0.01, small, -torch.log(1.0 - u.clamp_max(0.99999994)))  # exponential: -log(1 - u)
    return -torch.log(wait)


def philox_4x32(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).

    Args:
        counter: four 32-bit words, as int64 tensors (or arrays) that broadcast, or numbers. key: two of them.
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


def _draw_triton(logits: Tensor, noise: Noise, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    stats = torch.empty(3, rows, blocks, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    source = logits if kept is None else kept
    early = dependent(logits.device.type)
    _block_stats[(rows, -(-blocks // _BLOCKS_A_PROGRAM))](
        logits, source, noise.temperature, stats, vocab, blocks, rows * blocks, GREEDY_BELOW, KEPT=kept is not None,
        BLOCK=BLOCK, COUNT=_BLOCKS_A_PROGRAM, num_warps=4, **early,
    )  # fmt: skip
    _pick_token[(rows,)](
        logits, source, noise.temperature, noise.seed, noise.number, stats, token, logprob, vocab, blocks,
        rows * blocks, GREEDY_BELOW, BLOCK=BLOCK, BLOCKS=power_of_two(blocks, 16), num_warps=4,
        **early,
    )  # fmt: skip
    return token, logprob


@jit
def _block_stats(
    LOGITS, SOURCE, TEMPERATURE, STATS, vocab, blocks, plane, greedy_below, KEPT: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """STATS (3, B, K): log-sum-exp of each block, the same at the temperature, its largest (kept) logit."""
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(TEMPERATURE + row)
    inverse = tl.where(temperature <= greedy_below, 1.0, 1.0 / tl.maximum(temperature, greedy_below))
    for i in range(COUNT):
        block = tl.program_id(1) * COUNT + i
        v = block * BLOCK + tl.arange(0, BLOCK)
        at = STATS + row * blocks + block
        x = tl.load(LOGITS + row * vocab + v, mask=v < vocab, other=-float("inf"))
        top = tl.max(x, 0)
        top = tl.where(top == -float("inf"), 0.0, top)  # a block of impossible tokens
        total = top + tl.log(tl.sum(tl.exp(x - top), 0))
        s = x
        if KEPT:
            s = tl.load(SOURCE + row * vocab + v, mask=v < vocab, other=-float("inf"))
        peak = tl.max(s, 0)
        safe = tl.where(peak == -float("inf"), 0.0, peak)  # a block with nothing kept
        mass = safe * inverse + tl.log(tl.sum(tl.exp((s - safe) * inverse), 0))
        inside = block < blocks
        tl.store(at, total, mask=inside)
        tl.store(at + plane, mass, mask=inside)
        tl.store(at + 2 * plane, peak, mask=inside)


@jit
def _gumbel(seed, index, number, LEVEL: tl.constexpr):
    zero = index * 0
    first, _, _, _ = tl.philox(seed, index, zero + number, zero + LEVEL, zero)
    u = (first.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    wait = tl.where(u < 0.01, small, -tl.log(1.0 - tl.minimum(u, 0.99999994)))
    return -tl.log(wait)


@jit
def _pick_token(
    LOGITS, SOURCE, TEMPERATURE, SEED, NUMBER, STATS, TOKEN, LOGPROB, vocab, blocks, plane, greedy_below,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    follow(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(TEMPERATURE + row)
    seed = tl.load(SEED + row)
    number = tl.load(NUMBER + row)
    greedy = temperature <= greedy_below
    inverse = tl.where(greedy, 1.0, 1.0 / tl.maximum(temperature, greedy_below))
    b = tl.arange(0, BLOCKS)
    inside = b < blocks
    at = STATS + row * blocks + b
    total = tl.load(at, mask=inside, other=-float("inf"))
    mass = tl.load(at + plane, mask=inside, other=-float("inf"))
    peak = tl.load(at + 2 * plane, mask=inside, other=-float("inf"))
    top = tl.max(total, 0)
    normaliser = top + tl.log(tl.sum(tl.exp(total - top), 0))
    score = tl.where(greedy, peak, mass + _gumbel(seed, b, number, 1))
    score = tl.where(inside, score, -float("inf"))
    block = tl.min(tl.where(score == tl.max(score, 0), b, BLOCKS - 1), 0)
    v = block * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(SOURCE + row * vocab + v, mask=v < vocab, other=-float("inf"))
    y = tl.where(greedy, s, s * inverse + _gumbel(seed, v, number, 0))
    y = tl.where(v < vocab, y, -float("inf"))
    # NaN logits compare equal to nothing: the clamp keeps the id in range, the log-prob then says what happened
    token = tl.minimum(tl.min(tl.where(y == tl.max(y, 0), v, 2147483647), 0), vocab - 1)
    tl.store(TOKEN + row, token.to(tl.int64))
    tl.store(LOGPROB + row, tl.load(LOGITS + row * vocab + token) - normaliser)


@dataclass(frozen=True, eq=False)
class RowState:
    """What a decoding step reads and moves on, one entry a row, all on the device.

    Attributes:
        token: (B,) int64, the newest, to be fed next. position: (B,) int64 of it.
        own_length: (B,) int32 tokens among the row's own pages, the newest included. prefix_length: (B,) int32.
        number: (B,) int32 tokens drawn so far. left: (B,) int32 that may still come. alive: (B,) int32, 0 once ended.
        seed: (B,) int64. temperature: (B,) fp32. stops: (B, 8) int32, -1 for none.
        top_k: (B,) int64. top_p, min_p: (B,) fp32.
    """

    token: Tensor
    position: Tensor
    own_length: Tensor
    prefix_length: Tensor
    number: Tensor
    left: Tensor
    alive: Tensor
    seed: Tensor
    temperature: Tensor
    stops: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @property
    def noise(self) -> Noise:
        return Noise(self.seed, self.number, self.temperature)


@dataclass(frozen=True, eq=False)
class Output:
    """Tokens and log-probs of some steps: (steps, B) int32 with -1 for rows that had ended, (steps, B) fp32; `at`
    (1,) int32 is the next step's line, from 0 again after the last."""

    tokens: Tensor
    logprobs: Tensor
    at: Tensor


def advance(state: RowState, token: Tensor, logprob: Tensor, out: Output) -> None:
    """Note each row's token (B,) and log-prob (B,) in `out`, and move the rows on in place. A row ends with a stop
    token or with the last it may draw; from then on it stands still."""
    if triton_ready(token.device.type) and logprob.dtype == torch.float32:
        rows = token.shape[0]
        _advance[(1,)](
            state.token, state.position, state.own_length, state.number, state.left, state.alive, state.stops, token,
            logprob, out.tokens, out.logprobs, out.at, rows, out.tokens.stride(0), out.tokens.shape[0],
            STOPS=state.stops.shape[1], BLOCK=power_of_two(rows), num_warps=4,
            **dependent(token.device.type),
        )  # fmt: skip
        return
    alive = state.alive
    line = out.at.long()
    count = token.shape[0]
    out.tokens[:, :count].index_copy_(0, line, torch.where(alive > 0, token, -1).to(torch.int32)[None])
    out.logprobs[:, :count].index_copy_(0, line, logprob.to(out.logprobs.dtype)[None])
    out.at.add_(1).remainder_(out.tokens.shape[0])
    stopped = (state.stops == token[:, None]).any(1)
    state.left.sub_(alive)
    alive.mul_((~stopped & (state.left > 0)).to(alive.dtype))
    state.token.copy_(torch.where(alive > 0, token, state.token))
    for moving in (state.position, state.own_length, state.number):
        moving.add_(alive)
    state.own_length.clamp_min_(1)  # a row that ends with its first token still attends to something


@jit
def _advance(
    STATE_TOKEN, POSITION, OWN_LENGTH, NUMBER, LEFT, ALIVE, STOP_IDS, TOKEN, LOGPROB, OUT_TOKENS, OUT_LOGPROBS, AT,
    rows, out_stride, lines, STOPS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    follow(DEPENDENT)
    r = tl.arange(0, BLOCK)
    ok = r < rows
    token = tl.load(TOKEN + r, mask=ok, other=0)
    alive = tl.load(ALIVE + r, mask=ok, other=0)
    line = tl.load(AT)
    tl.store(OUT_TOKENS + line * out_stride + r, tl.where(alive > 0, token, -1).to(tl.int32), mask=ok)
    tl.store(OUT_LOGPROBS + line * out_stride + r, tl.load(LOGPROB + r, mask=ok, other=0.0), mask=ok)
    left = tl.load(LEFT + r, mask=ok, other=0) - alive
    tl.store(LEFT + r, left, mask=ok)
    on = tl.where(left > 0, alive, 0)
    for i in tl.static_range(STOPS):
        stop = tl.load(STOP_IDS + r * STOPS + i, mask=ok, other=-1)
        on = tl.where(stop == token, 0, on)
    tl.store(ALIVE + r, on, mask=ok)
    tl.store(STATE_TOKEN + r, token, mask=ok & (on > 0))  # a row that stands still repeats its step
    tl.store(POSITION + r, tl.load(POSITION + r, mask=ok, other=0) + on, mask=ok)
    tl.store(OWN_LENGTH + r, tl.maximum(tl.load(OWN_LENGTH + r, mask=ok, other=0) + on, 1), mask=ok)
    tl.store(NUMBER + r, tl.load(NUMBER + r, mask=ok, other=0) + on, mask=ok)
    tl.debug_barrier()
    tl.store(AT, (line + 1) % lines)

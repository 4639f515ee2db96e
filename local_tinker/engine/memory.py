"""The memory plan: bytes of every part of a training step, and what to choose so that they fit. Pure arithmetic.

Legend: H hidden, F intermediate, Q query width, K key width, L layers, V vocabulary, c bytes of a compute element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import UsageError
from ..model.dims import ModelDims

GIB = 2**30
# What a layer keeps for its backward pass, shallowest first: everything; all but the norms' outputs; also without gate
# and up; also without q, k and v; its input only.
LEVELS = ("none", "norms", "mlp", "attention_mlp", "layer")
# What the engine implements of them: a layer keeps everything for its backward pass, or its input only.
ENGINE_LEVELS = ("none", "layer")
QUANTIZE = ("4bit", "8bit", "none")
READY, TIGHT = 0.85, 0.95  # shares of free memory: the rest is for fragmentation and what else runs on the card
COMFORTABLE_TOKENS = 4096  # below this, launches and dequantisation cost more than the next recompute level
MIN_TOKENS = 512
MOST_TOKENS = {"cuda": 8192, "cpu": 4096}
OVERHEAD = {"cuda": 600 * 2**20, "cpu": 500 * 2**20}  # driver context and library workspaces
HEAD_ROWS = (2048, 1024, 512, 256)
HEAD_LOGIT_BYTES = 12  # fp32 logits, their shifted copy and the probabilities are alive at once
# NF4 with double quantisation: half a byte, one byte of absmax a 64-block, four bytes a 256 of those
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What the user chose, and what the road can do.

    Args:
        tokens: most tokens of a micro-batch; None: 8,192 on a card, 4,096 on a CPU.
        seq_len: the longest sequence, which is never cut to fit a micro-batch.
        compute_bytes: 2 for bf16, 4 for fp32, 8 for fp64.
        levels: recompute levels the road implements.
        overhead_bytes: None for the usual overhead of the device; 0 where free memory was measured after start-up.
    """

    kind: str = "cuda"
    rank: int = 32
    quantize: str = "4bit"
    tokens: int | None = None
    seq_len: int = 0
    compute_bytes: int = 2
    levels: tuple[str, ...] = LEVELS
    overhead_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE:
            raise UsageError(f"quantize must be one of {', '.join(QUANTIZE)}, got {self.quantize!r}")
        if self.kind not in MOST_TOKENS:
            raise UsageError(f"kind must be cuda or cpu, got {self.kind!r}")
        if not self.levels or any(level not in LEVELS for level in self.levels):
            raise UsageError(f"levels must be some of {', '.join(LEVELS)}, got {self.levels!r}")
        if self.rank < 0 or (self.tokens is not None and self.tokens < 1):
            raise UsageError(f"rank must be >= 0 and tokens >= 1, got rank={self.rank}, tokens={self.tokens}")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the engine should do.

    Args:
        tokens: token budget of a micro-batch (`micro_batch_tokens`).
        resident_layers: layers whose dequantised weights stay on the device.
        head_rows: positions of one chunk of the output head.
    """

    level: str
    tokens: int
    resident_layers: int
    head_rows: int

    @property
    def micro_batch_tokens(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Lever:
    """A way to need less: what to change and the bytes it saves."""

    change: str
    saves: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted peak of one training step.

    Args:
        parts: name -> bytes; they add up to `total`.
        fits: the total is within 95 % of free memory.
        levers: up to three ways to need less, the cheapest in speed and quality first.
    """

    choice: Choice
    parts: dict[str, int]
    fits: bool
    levers: tuple[Lever, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_training(dims: ModelDims, settings: TrainSettings, free_bytes: int) -> Plan:
    """Choose recompute level, micro-batch and residency for `free_bytes`, and say where every byte goes.

    The first level, shallowest first, at which a comfortable micro-batch stays within 85 % of free memory is taken;
    where none does, the deepest one with as many tokens as 95 % allows.
    """
    choice, fits = _choose(dims, settings, free_bytes)
    parts = training_parts(dims, settings, choice)
    return Plan(choice=choice, parts=parts, fits=fits, levers=_levers(dims, settings, choice))


def status(dims: ModelDims, free_bytes: int, settings: TrainSettings | None = None) -> str:
    """Ready: a 4,096-token step stays within 85 % of free memory. Tight: a 512-token one within 95 %. Else OOM."""
    settings = settings or TrainSettings()
    if least_bytes(dims, settings, COMFORTABLE_TOKENS) <= READY * free_bytes:
        return "ready"
    return "tight" if least_bytes(dims, settings, MIN_TOKENS) <= TIGHT * free_bytes else "OOM"


def least_bytes(dims: ModelDims, settings: TrainSettings, tokens: int) -> int:
    """Peak of a step of `tokens` with every memory saver on."""
    choice = Choice(level=_deepest(settings), tokens=tokens, resident_layers=0, head_rows=HEAD_ROWS[-1])
    return sum(training_parts(dims, settings, choice).values())


def sampler_bytes(dims: ModelDims, rows: int, tokens: int, *, compute_bytes: int = 2) -> int:
    """Key and value cache of `rows` sequences of `tokens` positions: 2 c L K each."""
    return 2 * compute_bytes * dims.layers * dims.key * rows * tokens


def saved_bytes(dims: ModelDims, level: str, *, compute_bytes: int = 2) -> int:
    """Bytes a token and layer keeps for the backward pass.

    x and the second residual 2H, their norms 2H, q and the attention output 2Q, k and v 2K, gate and up 2F; fp32: one
    scale for each norm and the log-sum-exp of each head.
    """
    h, f, q, k = dims.hidden, dims.intermediate, dims.query, dims.key
    scales = 2 * 4 + 4 * dims.heads
    return {
        "none": compute_bytes * (4 * h + 2 * q + 2 * k + 2 * f) + scales,
        "norms": compute_bytes * (2 * h + 2 * q + 2 * k + 2 * f) + scales,
        "mlp": compute_bytes * (2 * h + 2 * q + 2 * k) + scales,
        "attention_mlp": compute_bytes * (2 * h + q) + scales,
        "layer": compute_bytes * h,
    }[level]


def live_bytes(dims: ModelDims, *, compute_bytes: int = 2) -> int:
    """Bytes a token needs once: final hidden states and gradients 3H, and the tensors of the layer in backward."""
    h, f, q, k = dims.hidden, dims.intermediate, dims.query, dims.key
    return compute_bytes * (3 * h + 6 * h + 3 * q + 4 * k + 4 * f)


def base_bytes(dims: ModelDims, quantize: str, *, compute_bytes: int = 2) -> int:
    """The frozen weights without embeddings and head; norms and biases are never quantised."""
    outs = dims.layers * sum(o for _, o in dims.projections.values())
    linear = {
        "4bit": _NF4 * dims.linear_params,
        "8bit": dims.linear_params + 4 * outs,  # one fp32 scale a row
        "none": compute_bytes * dims.linear_params,
    }[quantize]
    return round(linear) + compute_bytes * dims.small_params


def training_parts(dims: ModelDims, settings: TrainSettings, choice: Choice) -> dict[str, int]:
    """Bytes of every part at the peak of a step with this choice."""
    c, lora = settings.compute_bytes, dims.lora_params(settings.rank)
    quantized = settings.quantize != "none"
    dense = c * dims.linear_params // dims.layers
    scratch = 2 * c * dims.hidden * dims.intermediate if quantized and choice.resident_layers < dims.layers else 0
    overhead = OVERHEAD[settings.kind] if settings.overhead_bytes is None else settings.overhead_bytes
    # CPUs have no bf16 product with fp32 output, so the head is widened there
    widened = 4 * dims.vocab * dims.hidden if settings.kind == "cpu" and c == 2 else 0
    saved = dims.layers * saved_bytes(dims, choice.level, compute_bytes=c)
    return {
        "base weights": base_bytes(dims, settings.quantize, compute_bytes=c),
        "embeddings and head": c * dims.embedding_params + widened,
        "adapter": (max(4, c) + (c if c < 4 else 0)) * lora,
        "adapter gradient": max(4, c) * lora,
        "optimizer": 2 * max(4, c) * lora,
        "activations": choice.tokens * saved,
        "live layer": choice.tokens * live_bytes(dims, compute_bytes=c),
        "attention workspace": choice.tokens * 4 * dims.query,
        "head chunk": choice.head_rows * dims.vocab * HEAD_LOGIT_BYTES,
        "dequantisation": scratch,
        "resident weights": choice.resident_layers * dense,
        "overhead": overhead,
    }


def _deepest(settings: TrainSettings) -> str:
    return max(settings.levels, key=LEVELS.index)


def _head_rows(dims: ModelDims, free_bytes: int) -> int:
    """The most rows whose chunk stays within 1/32 of memory; few rows cost the head about a tenth of its time."""
    for rows in HEAD_ROWS:
        if rows * dims.vocab * HEAD_LOGIT_BYTES <= free_bytes / 32:
            return rows
    return HEAD_ROWS[-1]


def _choose(dims: ModelDims, settings: TrainSettings, free_bytes: int) -> tuple[Choice, bool]:
    rows = _head_rows(dims, free_bytes)
    wanted = max(settings.tokens or MOST_TOKENS[settings.kind], settings.seq_len)
    enough = max(min(wanted, COMFORTABLE_TOKENS), settings.seq_len)
    least = min(enough, max(MIN_TOKENS, settings.seq_len))
    deepest = _deepest(settings)
    tries = [(level, rows) for level in sorted(settings.levels, key=LEVELS.index)]
    for level, head_rows in [*tries, (deepest, HEAD_ROWS[-1])]:
        most = _most_tokens(dims, settings, level, head_rows, READY * free_bytes)
        if most >= enough:
            tokens = _whole(min(wanted, most), enough)
            choice = Choice(level=level, tokens=tokens, resident_layers=0, head_rows=head_rows)
            return _with_residency(dims, settings, choice, free_bytes), True
    most = _most_tokens(dims, settings, deepest, HEAD_ROWS[-1], TIGHT * free_bytes)
    tokens = _whole(min(wanted, max(most, least)), least)
    return Choice(level=deepest, tokens=tokens, resident_layers=0, head_rows=HEAD_ROWS[-1]), most >= least


def _most_tokens(dims: ModelDims, settings: TrainSettings, level: str, rows: int, budget: float) -> int:
    """The tokens that fit a budget."""

    def total(tokens: int) -> int:
        choice = Choice(level=level, tokens=tokens, resident_layers=0, head_rows=rows)
        return sum(training_parts(dims, settings, choice).values())

    fixed = total(0)
    return max(0, int((budget - fixed) / (total(1) - fixed)))


def _whole(tokens: int, least: int) -> int:
    """Down to a multiple of 64, which makes faster matrix products, but not below `least`."""
    return max(tokens // 64 * 64, least)


def _with_residency(dims: ModelDims, settings: TrainSettings, choice: Choice, free_bytes: int) -> Choice:
    if settings.quantize == "none":
        return choice
    parts = training_parts(dims, settings, choice)
    layer = settings.compute_bytes * dims.linear_params // dims.layers
    spare = READY * free_bytes - sum(parts.values())
    return replace(choice, resident_layers=max(0, min(dims.layers, int(spare / layer))))


def _levers(dims: ModelDims, settings: TrainSettings, choice: Choice) -> tuple[Lever, ...]:
    def saves(other_settings: TrainSettings, other: Choice) -> int:
        return before - sum(training_parts(dims, other_settings, other).values())

    before = sum(training_parts(dims, settings, choice).values())
    deeper = [level for level in LEVELS[LEVELS.index(choice.level) + 1 :] if level in settings.levels]
    half = max(choice.tokens // 2, settings.seq_len)
    levers = [Lever("keep no dequantised weights resident", saves(settings, replace(choice, resident_layers=0)))]
    for level in deeper[:1]:
        levers.append(Lever(f"recompute level {level!r}", saves(settings, replace(choice, level=level))))
    levers.append(Lever(f"micro-batches of {half:,} tokens", saves(settings, replace(choice, tokens=half))))
    if settings.quantize != "4bit":
        levers.append(Lever('quantize="4bit"', saves(replace(settings, quantize="4bit"), choice)))
    if settings.seq_len > choice.tokens // 2:  # then it is the sequence that keeps the micro-batch long
        shorter = settings.seq_len // 2
        levers.append(Lever(f"max_length={shorter}", saves(settings, replace(choice, tokens=shorter))))
    for rank in (settings.rank // 2, settings.rank // 4):
        if rank < 1:
            continue
        levers.append(Lever(f"rank={rank}", saves(replace(settings, rank=rank), choice)))
    return tuple(lever for lever in levers if lever.saves > 0)[:3]

"""Bytes of every part of a training step, predicted from dimensions alone. No torch, no state.

Legend: N tokens of a micro-batch, H hidden, F intermediate, Q query width, K key width, L layers, V vocabulary, R rank,
P adapter parameters, c bytes of a compute element.

Parts that are there all the time: weights, adapter, moments. On top of them comes one moment at a time: the loss head,
while every layer's activations are kept, or the backward pass of one layer, beside what the layers before it keep. The
deepest moment is the peak.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..errors import UsageError
from ..model.dims import ModelDims, rows_below
from ..model.levels import LEVELS, TILE, TILED

MIB, GIB = 2**20, 2**30
QUANTIZE = ("4bit", "8bit", "none")
COMPUTE = (None, "fp8")
KINDS = ("cuda", "cpu")

# Fitted to measurement by benchmarks/memory_plan.py. What cuBLAS and the kernels hold for themselves, with what many
# small tensors round up to; and what the driver and the libraries take before anything is loaded.
WORKSPACE = {"cuda": 64 * MIB, "cpu": 8 * MIB}
CONTEXT = {"cuda": 512 * MIB, "cpu": 512 * MIB}

NORM_AFTER = frozenset({"gemma2", "gemma3_text", "olmo2"})  # a norm follows each block, which must keep its output
HEAD_NORM = frozenset({"qwen3", "gemma3_text", "olmo2"})  # q and k are normed: raw and rotated exist side by side
# times what our layer keeps, in transformers' modules under PEFT: 1.94 on a 3B, 1.98 on a 7B, measured
PLAIN_KEEPS = 2
# An element of a head's scores where a document runs through the model's own attention: at most, and from then to its
# backward pass, which wants fp32 probabilities and those of the compute type. Counted in transformers' eager attention.
SCORE_BYTES = 12
# fp32 logits, their gradient written over them; plain torch makes six copies
HEAD_LOGIT_BYTES = {"cuda": 4, "cpu": 24}
MOMENT_SLICE = 2**22  # parameters the optimiser works on at a time; parked moments pass through the card in such slices
# NF4 with double quantisation: half a byte, one byte of absmax a 64-block, four bytes a 256 of those
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What the user chose, and what the device and the road can do.

    Args:
        tokens: the user's micro-batch budget, which is kept to; None leaves it to the plan.
        fewer: `tokens` may be undercut, since they ran out of memory.
        seq_len: the longest sequence (or pair), which is never cut to fit a micro-batch.
        compute_bytes: 2 for bf16, 4 for fp32, 8 for fp64.
        levels: recompute levels that may be chosen.
        adapter_params: P; None: an adapter of `rank` on every projection.
        plain: the model runs on the plain road.
        fp8: base products are of 8-bit floats, for which two copies of the weights are held, or made each time.
        alone: it does so one document a row, and its attention keeps the scores of all pairs of positions.
        dropout: masks are drawn for all rows of a micro-batch at once, so no MLP is computed in tiles.
        started: free memory was measured with the driver and libraries already in place.
        host_bytes: memory that may be pinned for parked moments and offloaded activations; None sets no limit.
    """

    kind: str = "cuda"
    rank: int = 32
    quantize: str = "4bit"
    tokens: int | None = None
    fewer: bool = False
    seq_len: int = 0
    compute_bytes: int = 2
    levels: tuple[str, ...] = LEVELS
    adapter_params: int | None = None
    plain: bool = False
    fp8: bool = False
    alone: bool = False
    dropout: bool = False
    started: bool = False
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.quantize not in QUANTIZE:
            raise UsageError(f"quantize must be one of {', '.join(QUANTIZE)}, got {self.quantize!r}")
        if self.kind not in KINDS:
            raise UsageError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.levels or any(level not in LEVELS for level in self.levels):
            raise UsageError(f"levels must be some of {', '.join(LEVELS)}, got {self.levels!r}")
        if self.rank < 0 or (self.tokens is not None and self.tokens < 1):
            raise UsageError(f"rank must be >= 0 and tokens >= 1, got rank={self.rank}, tokens={self.tokens}")

    @property
    def in_place(self) -> bool:
        """Whether the base lies as its products read it, always."""
        return self.quantize == "none" and not self.fp8

    def adapter(self, dims: ModelDims) -> int:
        return dims.lora_params(self.rank) if self.adapter_params is None else self.adapter_params


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the engine should do. None of it changes a gradient but for rounding.

    Args:
        tokens: token budget of a micro-batch.
        levels: recompute level of each layer; the first layers at the deeper of two neighbouring levels.
        resident_layers: how many of the first layers keep their weights dequantised on the device.
        head_rows: positions of one chunk of the output head.
        tile: rows of an MLP of which nothing is kept that are alive at once.
        parked_moments: the optimiser's moments live in pinned host memory.
    """

    tokens: int
    levels: tuple[str, ...]
    resident_layers: int = 0
    head_rows: int = 2048
    tile: int = TILE
    parked_moments: bool = False


def in_tiles(settings: TrainSettings, choice: Choice) -> bool:
    """Whether some layer's MLP is computed in more than one tile."""
    return choice.tokens > choice.tile and not (settings.plain or settings.dropout) and choice.levels[0] in TILED


def base_bytes(dims: ModelDims, quantize: str, *, compute_bytes: int = 2) -> int:
    """The frozen weights without embeddings and head; norms and biases are never quantised."""
    outs = dims.layers * sum(o for _, o in dims.projections.values())
    linear = {
        "4bit": _NF4 * dims.linear_params,
        "8bit": dims.linear_params + 4 * outs,  # one fp32 scale a row
        "none": compute_bytes * dims.linear_params,
    }[quantize]
    return round(linear) + compute_bytes * dims.small_params


def cache_bytes(dims: ModelDims, rows: int, tokens: int, *, compute_bytes: int = 2) -> int:
    """The sampler's keys and values for `rows` sequences of `tokens` positions: 2 c L K each."""
    return 2 * compute_bytes * dims.layers * dims.key * rows * tokens


def wide_bytes(dims: ModelDims, settings: TrainSettings, *names: str) -> int:
    """A group's weights dequantised as its product reads them, with the adapter's columns (or rows, of one member) beside."""
    shapes = [dims.projections[name] for name in names]
    if len(shapes) > 1:
        room = settings.rank * len(shapes) * sum(o for _, o in shapes)
    else:
        inputs, outputs = shapes[0]
        tiled = settings.kind == "cuda" and settings.compute_bytes == 2
        room = inputs * (rows_below(outputs, inputs, settings.rank) if tiled else settings.rank)
    return settings.compute_bytes * (sum(i * o for i, o in shapes) + room)


def layer_wide_bytes(dims: ModelDims, settings: TrainSettings) -> int:
    """One layer's weights, dequantised and resident."""
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return sum(wide_bytes(dims, settings, *group) for group in groups)


def saved_bytes(dims: ModelDims, settings: TrainSettings, level: str) -> int:
    """Bytes a token and layer keeps on the device for the backward pass; see `model.levels`."""
    c, h, q, k = settings.compute_bytes, dims.hidden, dims.query, dims.key
    if level in TILED:
        return c * h if level == "layer" else 0
    thin = 7 * settings.rank
    after = 2 * h if dims.model_type in NORM_AFTER else 0
    attention_mlp = c * (2 * h + q + thin + after) + 4 * dims.heads
    mlp = attention_mlp + c * (q + 2 * k)
    if level == "norms":
        return (mlp + c * 2 * dims.intermediate) * (PLAIN_KEEPS if settings.plain else 1)
    return {"mlp": mlp, "attention_mlp": attention_mlp}[level]


def layer_kept_bytes(dims: ModelDims, settings: TrainSettings, level: str, tokens: int) -> int:
    """Bytes a layer keeps of a micro-batch. Scores are counted as of one document, which is the most they can be."""
    scores = 0
    if settings.alone and level == "norms":
        scores = dims.heads * tokens**2 * (4 if settings.compute_bytes == 4 else 4 + settings.compute_bytes)
    return tokens * saved_bytes(dims, settings, level) + scores


def live_bytes(dims: ModelDims, settings: TrainSettings, level: str, tokens: int, *, tile: int = TILE) -> int:
    """What one layer holds beside the kept activations at its deepest: in forward, or in either half of its backward."""
    if settings.plain:  # autograd keeps the recomputed layer as it would have kept it before
        kept = layer_kept_bytes(dims, settings, "norms", tokens)
        scores = SCORE_BYTES * dims.heads * tokens**2 if settings.alone else 0
        again = tokens * saved_bytes(dims, settings, "norms") + scores - (kept if level == "norms" else 0)
        return again + tokens * settings.compute_bytes * (4 * dims.hidden + 3 * dims.intermediate)
    tile = min(tokens, tile) if level in TILED and not settings.dropout else tokens
    rounded = tile * 2 * dims.intermediate if settings.fp8 else 0  # the widest of what is made of 8-bit floats
    return rounded + settings.compute_bytes * max(
        _forward(dims, settings, level, tokens, tile), *_backward(dims, settings, level, tokens, tile)
    )


def _forward(dims: ModelDims, settings: TrainSettings, level: str, tokens: int, tile: int) -> int:
    """Elements, beside what the level keeps: of the attention half, or of the MLP with the output of the half before."""
    h, f, r = dims.hidden, dims.intermediate, settings.rank
    qkv = dims.query + 2 * dims.key
    if level not in TILED:
        dropped = {"norms": 0, "mlp": 2 * f}.get(level, 2 * f + qkv)
        return tokens * (2 * h + f + dropped)
    # an offloaded input is on the device until the layer is through, and the embedded tokens are
    beside = 2 * h if level == "offload" else 0
    attention = tokens * (beside + 2 * h + qkv + dims.query + 8 * r)
    if tile == tokens:
        return max(attention, tokens * (beside + 4 * h + 3 * f))
    return max(attention, tokens * (beside + 3 * h) + tile * (3 * h + 3 * f + 3 * r))


def _backward(dims: ModelDims, settings: TrainSettings, level: str, tokens: int, tile: int) -> tuple[int, int]:
    """Elements, of the MLP and of attention.

    Whole all the time are the gradient of the residual, with R columns of room, and that of the final hidden states. The
    MLP comes first, a tile of rows at a time where the level is tiled; gate and up are overwritten by their gradients.
    """
    r, h, f = settings.rank, dims.hidden, dims.intermediate
    q, qkv, tiled = dims.query, dims.query + 2 * dims.key, level in TILED
    whole = 2 * h + r + (h + r if dims.model_type in NORM_AFTER else 0)
    whole += 3 * h if level == "offload" else 0  # this layer's input, the next one on its way, the embedded tokens
    rebuilt = qkv + q + 4 * r if tiled else 0  # of the attention half
    # normed input and gate and up if they were not kept; then the gradient of act(gate) * up; then that of the input
    mlp = (0 if level == "norms" else 2 * f) + max(f, h + 2 * r) + (h if tiled else 0)
    # d(out) and d(qkv), then d(qkv) and the gradient of the input. Gate and up are gone.
    attention = max(q + qkv, qkv + h + 3 * r)
    attention += qkv if level == "attention_mlp" else 0
    attention += qkv if dims.model_type in HEAD_NORM else 0
    gone = 2 * f if level == "norms" else 0
    first = tokens * (whole + rebuilt + (h + r if tiled else 0)) + tile * mlp
    return first, tokens * (whole + rebuilt + attention - gone)


def standing_parts(dims: ModelDims, settings: TrainSettings, choice: Choice) -> dict[str, int]:
    """What is there all the time, whatever the micro-batch."""
    c, p = settings.compute_bytes, settings.adapter(dims)
    wide = max(4, c)
    # CPUs have no bf16 product with fp32 output, so the head is widened there
    widened = 4 * dims.vocab * dims.hidden if settings.kind == "cpu" and c == 2 else 0
    scratch = 0
    if not settings.in_place and choice.resident_layers < dims.layers:  # one group at a time
        scratch = wide_bytes(dims, settings, "gate_proj", "up_proj")
        if in_tiles(settings, choice):  # or both of the MLP for all its tiles
            scratch += wide_bytes(dims, settings, "down_proj")
        # dense, transposed and rounded exist side by side
        scratch = scratch * 5 // 2 if settings.fp8 else scratch
    beside = 0  # room for adapters where an unquantised base stands
    if settings.in_place:
        beside = dims.layers * layer_wide_bytes(dims, settings) - c * dims.linear_params
    context = 0 if settings.started else CONTEXT[settings.kind]
    return {
        "base weights": base_bytes(dims, settings.quantize, compute_bytes=c) + beside,
        "embeddings and head": c * dims.embedding_params + widened,
        "adapter": (wide + (c if c < 4 else 0)) * p,
        "adapter gradient": wide * p,
        # parked ones pass through the card in slices at the step, when no activation is there
        "optimizer": 0 if choice.parked_moments else moment_bytes(dims, settings),
        "resident weights": choice.resident_layers * layer_wide_bytes(dims, settings),
        "dequantisation": scratch,
        "overhead": WORKSPACE[settings.kind] + context,
    }


def deepest_moment(dims: ModelDims, settings: TrainSettings, choice: Choice) -> dict[str, int]:
    """The largest of what comes on top: the loss head, or the backward pass of the last layer of each level."""
    n, c = choice.tokens, settings.compute_bytes
    kept = n * (2 * c * dims.head_dim + 64)  # cos and sin; tokens, positions, targets, rows
    moments = []
    for level, count in Counter(choice.levels).items():  # deepest first, as the layers stand
        kept += count * layer_kept_bytes(dims, settings, level, n)
        moments.append(
            {"activations": kept, "live layer": live_bytes(dims, settings, level, n, tile=choice.tile), "loss head": 0}
        )
    # the last layer's output, its normed rows and their stored gradient
    head = choice.head_rows * dims.vocab * HEAD_LOGIT_BYTES[settings.kind] + 3 * n * c * dims.hidden
    moments.append({"activations": kept, "live layer": 0, "loss head": head})
    return max(moments, key=lambda moment: sum(moment.values()))


def training_parts(dims: ModelDims, settings: TrainSettings, choice: Choice) -> dict[str, int]:
    """Bytes of every part at the peak of a step with this choice; what is not there at the peak is 0."""
    return standing_parts(dims, settings, choice) | deepest_moment(dims, settings, choice)


def total_bytes(dims: ModelDims, settings: TrainSettings, choice: Choice) -> int:
    return sum(training_parts(dims, settings, choice).values())


def moment_bytes(dims: ModelDims, settings: TrainSettings) -> int:
    """Both of AdamW's moments."""
    return 2 * max(4, settings.compute_bytes) * settings.adapter(dims)


def host_bytes(dims: ModelDims, settings: TrainSettings, choice: Choice) -> int:
    """Pinned host memory of a choice: parked moments and the inputs of offloaded layers."""
    parked = 2 * _pinned_block(moment_bytes(dims, settings) // 2) if choice.parked_moments else 0
    offloaded = choice.levels.count("offload") * _pinned_block(choice.tokens * settings.compute_bytes * dims.hidden)
    return parked + offloaded


def _pinned_block(size: int) -> int:
    """What torch's allocator of pinned memory takes for a tensor of `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0

"""Plain data that crosses the surface: Tinker's names and fields, and our results. No torch at import.

Shapes: N tokens of one datum, K targets a position.
"""

from __future__ import annotations

import math
import numbers
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checks import at_least_0, flag, is_number, items, logprob, token_id
from .errors import UsageError
from .keywords import known_keywords

STOP_REASONS = ("stop", "length")


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(map(token_id, self.tokens)))

    @property
    def length(self) -> int:
        return len(self.tokens)


@known_keywords
@dataclass(frozen=True)
class ModelInput:
    """What the model reads: one or more chunks of token ids (Tinker's name and methods)."""

    chunks: tuple[EncodedTextChunk, ...] = ()

    def __post_init__(self) -> None:
        chunks = items("chunks", self.chunks)
        for chunk in chunks:
            if not hasattr(chunk, "tokens"):
                raise UsageError(f"chunks holds {chunk!r}; token ids alone are read by ModelInput.from_ints([...])")
        object.__setattr__(self, "chunks", chunks)

    @classmethod
    @known_keywords
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        return cls((EncodedTextChunk(items("tokens", tokens)),))

    @classmethod
    def empty(cls) -> ModelInput:
        return cls(())

    def to_ints(self) -> list[int]:
        return [t for chunk in self.chunks for t in chunk.tokens]

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk((token,)))

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


def _as_array(name: str, value: Any) -> np.ndarray:
    """Lists, numpy, torch and Tinker's TensorData -> numpy; integers as int64, floats as float32 unless given wider."""
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    elif hasattr(value, "detach"):
        tensor = value.detach().cpu()
        value = tensor.float().numpy() if str(tensor.dtype) in ("torch.bfloat16", "torch.float16") else tensor.numpy()
    keep_float64 = isinstance(value, np.ndarray) and value.dtype == np.float64
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"{name} is ragged: every position needs the same number of values ({error})") from None
    if array.dtype.kind == "b" or array.dtype.kind not in "iuf":
        raise UsageError(f"{name} holds {array.dtype.name} values; give numbers (a list, numpy array or torch tensor)")
    if name == "target_tokens":
        if array.dtype.kind == "f":
            raise UsageError("target_tokens holds floats; give integer token ids")
        return array.astype(np.int64)
    return array if keep_float64 else array.astype(np.float32)


@known_keywords
@dataclass(frozen=True, eq=False)
class Datum:
    """One training example as tokens: Tinker's `Datum`.

    Args:
        model_input: the N tokens the model reads.
        loss_fn_inputs: what the loss needs, aligned with the input's positions: ``target_tokens`` (N,) or (N, K) int64,
            already shifted (position i predicts ``target_tokens[i]``), ``weights``, ``logprobs``, ``advantages`` (N,).
        source: where it came from, for messages ("train.jsonl line 7").
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        model_input = self.model_input
        if not isinstance(model_input, ModelInput):
            if not hasattr(model_input, "to_ints"):
                raise UsageError(
                    f"model_input must be a ModelInput, got {type(model_input).__name__}; use ModelInput.from_ints"
                )
            object.__setattr__(self, "model_input", ModelInput.from_ints(model_input.to_ints()))
        if not isinstance(self.loss_fn_inputs, Mapping):
            raise UsageError(
                f"loss_fn_inputs must be a dict such as {{'target_tokens': ids}}, got {type(self.loss_fn_inputs).__name__}"
            )
        arrays = {name: _as_array(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", arrays)

    @property
    def length(self) -> int:
        return self.model_input.length

    @classmethod
    def coerce(cls, value: Any) -> Datum:
        """Ours as it is, `tinker.Datum` (anything with `model_input` and `loss_fn_inputs`) converted."""
        if isinstance(value, Datum):
            return value
        return cls(value.model_input, dict(value.loss_fn_inputs))


@known_keywords
@dataclass(frozen=True)
class AdamParams:
    """One AdamW step (Loshchilov & Hutter, arXiv 1711.05101) with the field names of Tinker.

    Args:
        grad_clip_norm: global norm the window's gradient is clipped to before Adam sees it; 0.0 turns clipping off.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            at_least_0(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise UsageError(f"{name} must be in [0, 1), got {value!r}")


@known_keywords
@dataclass(frozen=True, eq=False)
class Rollout:
    """Tokens a policy produced, possibly over several turns with tool tokens between.

    Args:
        prompt_tokens: ids given before the first sampled token.
        tokens: every id after the prompt, sampled or not.
        trained: per token, True where the policy sampled it (tool results and later user turns are False).
        logprobs: per token, full-vocabulary log-prob at temperature 1; 0.0 where `trained` is False.
        stop_reason: "stop" (ended by itself) or "length" (cut by max_tokens).
        weights_version: the snapshot that sampled it, e.g. ``"3f2a/17"``.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    logprobs: tuple[float, ...]
    stop_reason: str
    weights_version: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        kinds = {"prompt_tokens": token_id, "tokens": token_id, "trained": flag, "logprobs": logprob}
        for name, kind in kinds.items():
            object.__setattr__(self, name, tuple(map(kind, items(name, getattr(self, name)))))
        _check_rollout(self)


class Completion(str):
    """A sampled completion: the text without its final stop token, and what produced it.

    `==` and hashing are those of the text; bookkeeping goes by `id`. It pickles whole.

    Attributes:
        tokens: every sampled id, the stop token included; `logprobs` has the same length.
        logprobs: log-probabilities of the full, untempered distribution.
        prompt_tokens: the ids it continues.
        stop_reason: "stop" or "length".
        weights_version: the snapshot that sampled it.
        temperature, top_p, top_k, min_p: what it was drawn with; the log-probs know nothing of these.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    stop_reason: str
    weights_version: str
    id: str
    temperature: float
    top_p: float
    top_k: int | None
    min_p: float

    def __new__(
        cls,
        text: str,
        *,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        prompt_tokens: Sequence[int],
        stop_reason: str,
        weights_version: str,
        id: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
    ) -> Completion:
        self = super().__new__(cls, text)
        self.tokens = tuple(map(int, tokens))
        self.logprobs = tuple(map(float, logprobs))
        self.prompt_tokens = tuple(map(int, prompt_tokens))
        self.stop_reason = stop_reason
        self.weights_version = weights_version
        self.id = id or uuid.uuid4().hex
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        _check_rollout(self)
        return self

    @property
    def trained(self) -> tuple[bool, ...]:
        """Every token was sampled: a completion is the one-turn case of a `Rollout`."""
        return (True,) * len(self.tokens)

    @property
    def filtered(self) -> bool:
        """True when some tokens could not be drawn; at temperature 0 filters change nothing."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)

    def __reduce__(self):
        return _rebuild_completion, (str(self), {name: getattr(self, name) for name in Completion.__annotations__})


def _rebuild_completion(text: str, fields: dict[str, Any]) -> Completion:
    return Completion(text, **fields)


def _check_rollout(rollout: Any) -> None:
    lengths = {name: len(getattr(rollout, name)) for name in ("tokens", "logprobs", "trained")}
    if len(set(lengths.values())) != 1:
        raise UsageError(f"a rollout needs as many logprobs and trained flags as tokens, got {lengths}")
    for i, value in enumerate(rollout.logprobs):
        if not math.isfinite(value):
            raise UsageError(f"logprobs[{i}] of a rollout is {value}; every sampled token has a finite log-prob")
    if rollout.stop_reason not in STOP_REASONS:
        raise UsageError(f"stop_reason must be one of {STOP_REASONS}, got {rollout.stop_reason!r}")


class LossResult(numbers.Real):
    """What a forward_backward call came to: a number, with `.metrics` and `.logprobs`.

    Making one does not wait for the device; the first read of the value, the metrics or the log-probs does, once.

    Attributes:
        metrics: name -> float.
        logprobs: one float array (N,) or (N, K) a datum, in the order given.
    """

    __slots__ = ("_read", "_values")

    def __init__(self, read: Callable[[], tuple[float, dict[str, float], list[np.ndarray]]]) -> None:
        self._read, self._values = read, None

    def _get(self) -> tuple[float, dict[str, float], list[np.ndarray]]:
        if self._values is None:
            self._values, self._read = self._read(), None
        return self._values

    @property
    def metrics(self) -> dict[str, float]:
        return self._get()[1]

    @property
    def logprobs(self) -> list[np.ndarray]:
        return self._get()[2]

    def result(self) -> LossResult:
        """Itself, so that code written for Tinker's futures runs unchanged."""
        self._get()
        return self

    def item(self) -> float:
        return float(self)

    def __float__(self) -> float:
        return self._get()[0]

    def __repr__(self) -> str:
        return f"LossResult({float(self):.6g})"

    def __str__(self) -> str:
        return str(float(self))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __hash__(self) -> int:
        return hash(float(self))

    def __bool__(self) -> bool:
        return bool(float(self))

    def __round__(self, ndigits=None):
        return round(float(self), ndigits)

    def __reduce__(self):
        return _rebuild_loss, self._get()


def _rebuild_loss(value, metrics, logprobs) -> LossResult:
    return LossResult(lambda: (value, metrics, logprobs))


def _forward_to_float(name: str) -> Callable:
    def method(self, *others):
        converted = [float(o) if isinstance(o, LossResult) else o for o in others]
        return getattr(float(self), name)(*converted)

    method.__name__ = name
    return method


_REAL_METHODS = (
    "__abs__ __add__ __ceil__ __eq__ __floor__ __floordiv__ __ge__ __gt__ __le__ __lt__ __mod__ __mul__ __neg__ __pos__ __pow__ "
    "__radd__ __rfloordiv__ __rmod__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__ __trunc__"
)
for _name in _REAL_METHODS.split():
    setattr(LossResult, _name, _forward_to_float(_name))
LossResult.__abstractmethods__ = frozenset()


class StepResult:
    """What an optimiser step did; reading a field waits for the device once.

    Attributes:
        grad_norm: global norm of the window's gradient before clipping.
        skipped: True when the gradient was not finite: weights and moments are then unchanged.
        step: number of steps applied so far, this one included when it was not skipped.
    """

    __slots__ = ("_read", "_values")

    def __init__(self, read: Callable[[], tuple[float, bool, int]]) -> None:
        self._read, self._values = read, None

    def _get(self) -> tuple[float, bool, int]:
        if self._values is None:
            self._values, self._read = self._read(), None
        return self._values

    @property
    def grad_norm(self) -> float:
        return self._get()[0]

    @property
    def skipped(self) -> bool:
        return self._get()[1]

    @property
    def step(self) -> int:
        return self._get()[2]

    def result(self) -> StepResult:
        self._get()
        return self

    def __repr__(self) -> str:
        return f"StepResult(step={self.step}, grad_norm={self.grad_norm:.6g}, skipped={self.skipped})"

"""What is asked of the sampler and what it gives back. No torch."""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from dataclasses import dataclass, field
from typing import Any

from ..checks import integer, is_number
from ..errors import UsageError
from ..types import Completion
from .stop import StopRules, parse_stop


def derive_seed(seed: int, *indices: int) -> int:
    """An independent 63-bit seed for each place, e.g. (request seed, sample index); equal inputs give equal seeds."""
    text = ",".join(str(operator.index(value)) for value in (seed, *indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Filters apply in the order temperature, top_k, top_p, min_p.

    Args:
        max_tokens: at most this many new tokens.
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens whose probability reaches this share; 1 is off.
        top_k: the k most likely tokens; None, 0 and -1 are off.
        min_p: tokens at least this share of the most likely one's probability; 0 is off.
        seed: None draws a fresh one.
        stop: strings and token ids; None the model's own, [] nothing.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None

    def __post_init__(self) -> None:
        max_tokens = integer("max_tokens", self.max_tokens)
        if max_tokens < 1:
            raise UsageError(
                f"max_tokens must be 1 or more, got {max_tokens}; a prompt alone is scored by compute_logprobs"
            )
        temperature = _real("temperature", self.temperature)
        if temperature < 0:
            raise UsageError(f"temperature must be 0 (most likely token) or above, got {self.temperature}")
        top_p = _real("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}; 1 keeps every token, temperature=0 is greedy")
        min_p = _real("min_p", self.min_p)
        if not 0 <= min_p <= 1:
            raise UsageError(f"min_p must be in [0, 1], got {self.min_p}; 0 keeps every token")
        top_k = None if self.top_k is None else integer("top_k", self.top_k)
        if top_k is not None and top_k < -1:
            raise UsageError(f"top_k must be 1 or more, or None, 0 or -1 for off, got {top_k}")
        checked = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "top_k": top_k if top_k is not None and top_k > 0 else None,
            "seed": None if self.seed is None else integer("seed", self.seed),
            "stop": None if self.stop is None else parse_stop(self.stop),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def filtered(self) -> bool:
        """True when some tokens may be left out; never at temperature 0, where filters change nothing."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)


def _real(name: str, value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r} ({type(value).__name__})")
    return float(value)


@dataclass(frozen=True)
class Request:
    """One prompt and how many completions of it.

    Args:
        seed: sample i draws with `derive_seed(seed, i)`; None takes `params.seed`, or a fresh one where that is None.
        n: completions wanted.
    """

    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_rules: StopRules = field(default_factory=StopRules)
    seed: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        prompt = tuple(map(int, self.prompt_tokens))
        if not prompt:
            raise UsageError(
                "a prompt has no tokens; a model needs at least one to continue (its BOS or EOS token, say)"
            )
        if min(prompt) < 0:
            raise UsageError(f"prompt_tokens holds id {min(prompt)}; ids start at 0")
        if integer("n", self.n) < 1:
            raise UsageError(f"n must be 1 or more, got {self.n}")
        object.__setattr__(self, "prompt_tokens", prompt)
        seed = self.params.seed if self.seed is None else integer("seed", self.seed)
        # secrets, not random or torch: their global generators belong to the user's training run.
        object.__setattr__(self, "seed", secrets.randbits(63) if seed is None else seed)


@dataclass(frozen=True)
class Delta:
    """New tokens of one sample while it runs; `text` is "" while a character or a possible stop string is open."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Finished:
    """A whole sample.

    Args:
        request: index of its request in the order given. sample: 0..n-1.
        tokens: every sampled id, the stop token included. logprobs: as many, of the full untempered distribution.
        text: without the final stop token, cut before a stop string; None when the run had no tokenizer.
        stop_reason: "stop", or "length" at max_tokens or the end of the context.
    """

    request: int
    sample: int
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str | None
    stop_reason: str
    params: SamplingParams

    def completion(self, *, weights_version: str) -> Completion:
        assert self.text is not None, "a completion needs text: give the run a tokenizer"
        return Completion(
            self.text,
            tokens=self.tokens,
            logprobs=self.logprobs,
            prompt_tokens=self.prompt_tokens,
            stop_reason=self.stop_reason,
            weights_version=weights_version,
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            top_k=self.params.top_k,
            min_p=self.params.min_p,
        )

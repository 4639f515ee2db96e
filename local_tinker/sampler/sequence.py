"""What is asked of the sampler and the state of one completion in the making. No torch."""

from __future__ import annotations

import hashlib
import math
import numbers
import operator
import secrets
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..types import Completion
from .stop import StopMatcher, StopRules, decode, parse_stop

PAGE = 64  # tokens of the cache that are given out together; the kernels' tile of keys


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


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
        max_tokens = _whole("max_tokens", self.max_tokens)
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
        top_k = None if self.top_k is None else _whole("top_k", self.top_k)
        if top_k is not None and top_k < -1:
            raise UsageError(f"top_k must be 1 or more, or None, 0 or -1 for off, got {top_k}")
        checked = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "min_p": min_p,
            "top_k": top_k if top_k is not None and top_k > 0 else None,
            "seed": None if self.seed is None else _whole("seed", self.seed),
            "stop": None if self.stop is None else parse_stop(self.stop),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def filtered(self) -> bool:
        """True when some tokens may be left out; never at temperature 0, where filters change nothing."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})") from None


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
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
        prompt = tuple(int(token) for token in self.prompt_tokens)
        if not prompt:
            raise UsageError(
                "a prompt has no tokens; a model needs at least one to continue (its BOS or EOS token, say)"
            )
        if min(prompt) < 0:
            raise UsageError(f"prompt_tokens holds id {min(prompt)}; ids start at 0")
        if _whole("n", self.n) < 1:
            raise UsageError(f"n must be 1 or more, got {self.n}")
        object.__setattr__(self, "prompt_tokens", prompt)
        seed = self.params.seed if self.seed is None else _whole("seed", self.seed)
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

    def completion(self, *, weights_version: str) -> Completion:
        assert self.text is not None, "a completion needs text: give the run a tokenizer"
        return Completion(
            self.text,
            tokens=self.tokens,
            logprobs=self.logprobs,
            prompt_tokens=self.prompt_tokens,
            stop_reason=self.stop_reason,
            weights_version=weights_version,
        )


@dataclass(eq=False)
class Group:
    """All samples of one prompt in a run. With several of them the prompt is computed and stored once, for all.

    Attributes:
        shared: the prompt has pages of its own; otherwise its one row keeps it among the row's pages.
        pages: where a shared prompt is stored; empty before and after.
        computed: its tokens already in the cache.
        last_hidden: (H,) hidden state of the last prompt token, from which every sample draws its first token.
        waiting: samples not admitted yet. running: samples admitted. unfinished: both.
    """

    prompt_tokens: tuple[int, ...]
    shared: bool = False
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    last_hidden: Any = None
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0
    unfinished: int = 0

    @property
    def context(self) -> tuple[int, ...]:
        """What its own pages hold."""
        return self.prompt_tokens

    @property
    def before(self) -> list[int]:
        """Pages of what stands before the context."""
        return []

    @property
    def offset(self) -> int:
        """Position of the context's first token."""
        return 0


@dataclass(eq=False)
class Sequence:
    """One sample in the making.

    Args:
        max_new: tokens it may still come to: max_tokens, or what the context leaves.
        tokenizer: None when only tokens are wanted. stream: text is needed token by token.

    Attributes:
        pages: its own. slot: its row on the device while it decodes.
        computed, last_hidden: of its own context, where it has one to compute before it decodes.
    """

    group: Group
    request: int
    sample: int
    params: SamplingParams
    rules: StopRules
    seed: int
    max_new: int
    tokenizer: Any = None
    stream: bool = False
    skip_special_tokens: bool = False
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: str | None = None

    def __post_init__(self) -> None:
        # Text is followed token by token only where somebody looks at it; otherwise it is decoded once at the end.
        follow = self.tokenizer is not None and (self.stream or bool(self.rules.stop_strings))
        skip = self.skip_special_tokens
        self._matcher = StopMatcher(self.rules, self.tokenizer, skip_special_tokens=skip) if follow else None
        self._texts: list[str] = []
        self._last_hidden: Any = None
        self.restart()

    # -- its place in the cache --------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Take stock for a new start: what its own pages will hold before it decodes, and how far they may fill."""
        self.context = [*(() if self.group.shared else self.group.prompt_tokens), *self.tokens]
        self.computed, self._last_hidden = 0, None
        self._reach = len(self.context)

    @property
    def before(self) -> list[int]:
        return self.group.pages

    @property
    def offset(self) -> int:
        return len(self.group.prompt_tokens) if self.group.shared else 0

    @property
    def last_hidden(self) -> Any:
        return self._last_hidden if self.context else self.group.last_hidden

    @last_hidden.setter
    def last_hidden(self, hidden: Any) -> None:
        self._last_hidden = hidden

    @property
    def most(self) -> int:
        """Tokens its own pages may come to hold; the last token is never fed back, so nothing of it is stored."""
        return (0 if self.group.shared else len(self.group.prompt_tokens)) + self.max_new - 1

    @property
    def remaining(self) -> int:
        """Decoding steps it may still need that were not started."""
        return self.most - self._reach

    @property
    def exhausted(self) -> bool:
        return self.remaining <= 0

    def pages_after(self, steps: int) -> int:
        return max(1, pages_for(min(self.most, self._reach + steps)))

    def advance(self, steps: int) -> None:
        """So many decoding steps were started."""
        self._reach = min(self.most, self._reach + steps)

    # -- its tokens --------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.stop_reason is not None

    def push(self, token: int, logprob: float) -> Delta:
        """Add a sampled token; sets `stop_reason` when it was the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._matcher is None:
            stopped, text = token in self.rules.stop_ids, ""
        else:
            stopped, text = self._matcher.push(token)
        if stopped:
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.max_new:
            self.stop_reason = "length"
            text += self._matcher.finish() if self._matcher else ""
        if text:
            self._texts.append(text)
        return Delta(self.request, self.sample, (token,), (logprob,), text)

    def extend(self, tokens: list[int], logprobs: list[float]) -> list[Delta]:
        """Add the tokens of some steps, up to the one that ends it; the deltas where they are streamed."""
        if self._matcher is None and not self.rules.stop_ids:
            count = min(len(tokens), self.max_new - len(self.tokens))
            self.tokens += tokens[:count]
            self.logprobs += logprobs[:count]
            if len(self.tokens) >= self.max_new:
                self.stop_reason = "length"
            return []
        deltas = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finished:
                break
            delta = self.push(token, logprob)
            if self.stream:
                deltas.append(delta)
        return deltas

    def result(self) -> Finished:
        assert self.stop_reason is not None, "result() of a sequence that still runs"
        return Finished(
            request=self.request,
            sample=self.sample,
            prompt_tokens=self.group.prompt_tokens,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            text=self._text(),
            stop_reason=self.stop_reason,
        )

    def _text(self) -> str | None:
        if self.tokenizer is None:
            return None
        if self._matcher is not None:
            return "".join(self._texts)
        shown = self.tokens[:-1] if self.stop_reason == "stop" else self.tokens
        return decode(self.tokenizer, shown, skip_special_tokens=self.skip_special_tokens)


def check_ids(tokens: tuple[int, ...], *, vocab_size: int) -> None:
    # An id past the embedding would end the whole process on CUDA.
    if max(tokens) >= vocab_size:
        raise UsageError(
            f"a prompt holds token id {max(tokens)}, the model has {vocab_size}: was it encoded by another tokenizer?"
        )


def build_groups(
    requests: Iterable[Request],
    *,
    max_positions: int,
    vocab_size: int,
    tokenizer: Any,
    stream: bool,
    skip_special_tokens: bool,
    share: bool | None = None,
) -> list[Group]:
    """Requests -> groups in order of first appearance; equal prompts share one group.

    Args:
        share: whether prompts get pages of their own; None: those with several samples do.
    """
    requests = list(requests)
    samples: Counter[tuple[int, ...]] = Counter()
    for request in requests:
        samples[request.prompt_tokens] += request.n
    groups: dict[tuple[int, ...], Group] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt_tokens
        check_ids(prompt, vocab_size=vocab_size)
        room = max_positions - len(prompt)
        if room < 1:
            raise UsageError(
                f"prompt {index} has {len(prompt)} tokens and the model's context is {max_positions}: "
                f"no room for an answer; shorten the prompt to {max_positions - 1} tokens or fewer"
            )
        if tokenizer is None and (stream or request.stop_rules.stop_strings):
            raise UsageError("stop strings and streamed text need the tokenizer; pass tokenizer= to the run")
        group = groups.setdefault(prompt, Group(prompt, shared=samples[prompt] > 1 if share is None else share))
        for sample in range(request.n):
            sequence = Sequence(
                group=group,
                request=index,
                sample=sample,
                params=request.params,
                rules=request.stop_rules,
                seed=derive_seed(request.seed, sample),
                max_new=min(request.params.max_tokens, room),
                tokenizer=tokenizer,
                stream=stream,
                skip_special_tokens=skip_special_tokens,
            )
            group.waiting.append(sequence)
            group.unfinished += 1
    return list(groups.values())

"""Samples in the making, and the prompts they share. Host bookkeeping only, no torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .sequence import Delta, Finished, Request, SamplingParams, derive_seed
from .stop import StopMatcher, StopRules, decode

PAGE = 64  # tokens of the cache that are given out together; the kernels' tile of keys


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


@dataclass(eq=False)
class Group:
    """Samples that begin with the same tokens: all of one prompt, or one each of prompts with a common beginning. What
    they share is computed and stored once, for all. Groups that begin alike stand on a group of that beginning.

    Attributes:
        prompt_tokens: what they share, from the first token on.
        shared: it has pages of its own; otherwise its one row keeps it among the row's pages.
        base: the group of what these and other groups begin with, whole pages of it; it has no samples itself.
        pages: where what follows the base is stored; empty before and after.
        computed: tokens of its context already in the cache.
        last_hidden: (H,) hidden state of its last token, from which samples of this very prompt draw their first token.
        waiting: samples not admitted yet. running: samples admitted, or groups on this base that have pages.
        unfinished: samples, or groups on this base, that have not ended.
    """

    prompt_tokens: tuple[int, ...]
    shared: bool = False
    base: Group | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    last_hidden: Any = None
    waiting: deque[Sequence] = field(default_factory=deque)
    running: int = 0
    unfinished: int = 0

    @property
    def context(self) -> tuple[int, ...]:
        """What its own pages hold."""
        return self.prompt_tokens[self.offset :]

    @property
    def before(self) -> list[int]:
        """Pages of what stands before the context."""
        return [] if self.base is None else self.base.all_pages

    @property
    def offset(self) -> int:
        """Position of the context's first token."""
        return 0 if self.base is None else len(self.base.prompt_tokens)

    @property
    def all_pages(self) -> list[int]:
        """Pages of all its tokens; the base fills its own to the end."""
        return self.before + self.pages

    @property
    def chain(self) -> list[Group]:
        """What has pages of its own in the order of the tokens, this group last; empty where its row keeps it."""
        below = [] if self.base is None else self.base.chain
        return [*below, self] if self.shared else []


@dataclass(eq=False)
class Sequence:
    """One sample in the making.

    Args:
        rest: what its prompt holds after the group's tokens.
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
    rest: tuple[int, ...] = ()
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
        self.context = [*(() if self.group.shared else self.group.prompt_tokens), *self.rest, *self.tokens]
        self.computed, self._last_hidden = 0, None
        self._reach = len(self.context)

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        return self.group.prompt_tokens + self.rest

    @property
    def before(self) -> list[int]:
        return self.group.all_pages

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
        return (0 if self.group.shared else len(self.group.prompt_tokens)) + len(self.rest) + self.max_new - 1

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
            prompt_tokens=self.prompt_tokens,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            text=self._text(),
            stop_reason=self.stop_reason,
            params=self.params,
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
    """Requests -> groups in order of first appearance.

    Args:
        share: whether every prompt has pages of its own; None: prompts with several samples do, and lone samples whose
            prompts begin alike share that beginning, and so do groups.
    """
    requests = list(requests)
    samples: Counter[tuple[int, ...]] = Counter()
    for index, request in enumerate(requests):
        _check(request, index, max_positions, vocab_size, tokenizer is None and stream, tokenizer is None)
        samples[request.prompt_tokens] += request.n
    common = _common_beginnings([p for p, n in samples.items() if n == 1]) if share is None else {}
    groups: dict[tuple[tuple[int, ...], bool], Group] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt_tokens
        cut = common.get(prompt, len(prompt))
        shared = (samples[prompt] > 1 or cut < len(prompt)) if share is None else share
        # A prompt that is another's common beginning is a group of its own: its samples draw from it.
        group = groups.setdefault((prompt[:cut], cut < len(prompt)), Group(prompt[:cut], shared=shared))
        for sample in range(request.n):
            sequence = Sequence(
                group=group,
                request=index,
                sample=sample,
                params=request.params,
                rules=request.stop_rules,
                seed=derive_seed(request.seed, sample),
                max_new=min(request.params.max_tokens, max_positions - len(prompt)),
                rest=prompt[cut:],
                tokenizer=tokenizer,
                stream=stream,
                skip_special_tokens=skip_special_tokens,
            )
            group.waiting.append(sequence)
            group.unfinished += 1
    found = list(groups.values())
    if share is None:
        _put_on_bases(found)
        for row in (row for group in found for row in group.waiting):
            row.restart()
    return found


def _check(request: Request, index: int, max_positions: int, vocab_size: int, streams_blind: bool, blind: bool) -> None:
    check_ids(request.prompt_tokens, vocab_size=vocab_size)
    if len(request.prompt_tokens) >= max_positions:
        raise UsageError(
            f"prompt {index} has {len(request.prompt_tokens)} tokens and the model's context is {max_positions}: "
            f"no room for an answer; shorten the prompt to {max_positions - 1} tokens or fewer"
        )
    if streams_blind or (blind and request.stop_rules.stop_strings):
        raise UsageError("stop strings and streamed text need the tokenizer; pass tokenizer= to the run")


def _common_beginnings(prompts: Several[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Prompt -> how many of its first tokens it shares with others, at least a page and less than all of it."""
    return {prompt: _common(cluster) for cluster in _alike(prompts, 0) for prompt in cluster}


def _put_on_bases(groups: Several[Group], base: Group | None = None) -> None:
    """Groups that begin alike get a base, and those of them that go on alike another one on top of it."""
    done = 0 if base is None else len(base.prompt_tokens)
    of_prompt: dict[tuple[int, ...], list[Group]] = {}
    for group in groups:
        of_prompt.setdefault(group.prompt_tokens, []).append(group)
    for cluster in _alike(list(of_prompt), done):
        length = _common(cluster) // PAGE * PAGE
        members = [group for prompt in cluster for group in of_prompt[prompt]]
        common = Group(cluster[0][:length], shared=True, base=base, unfinished=len(members))
        for group in members:
            if group.base is not None:
                group.base.unfinished -= 1
            group.base, group.shared = common, True
        if base is not None:
            base.unfinished += 1
        _put_on_bases(members, common)


def _alike(prompts: Several[tuple[int, ...]], start: int) -> list[list[tuple[int, ...]]]:
    """Prompts with the same page of tokens from `start` on and more after it, those that are not the only one."""
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt in prompts:
        if len(prompt) > start + PAGE:
            alike.setdefault(prompt[start : start + PAGE], []).append(prompt)
    return [cluster for cluster in alike.values() if len(cluster) > 1]


def _common(prompts: Several[tuple[int, ...]]) -> int:
    """How many first tokens are the same in all, less than all of any."""
    first, last = min(prompts), max(prompts)  # in order: these differ the earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(length, min(map(len, prompts)) - 1)

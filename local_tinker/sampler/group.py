"""Samples in the making, and the prompts they share. Host bookkeeping only, no torch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .sequence import Delta, Finished, SamplingParams
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
        if self.finished:
            return []
        if self._matcher is None and not self.stream and self.rules.stop_ids.isdisjoint(tokens):
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

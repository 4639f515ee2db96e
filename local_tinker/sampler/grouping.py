"""Which samples share what: requests -> groups, and the beginnings that groups stand on. Host bookkeeping only, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError
from .group import PAGE, Group
from .group import Sequence as Row
from .sequence import Request, derive_seed


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
            row = Row(
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
            group.waiting.append(row)
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


def _common_beginnings(prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Prompt -> how many of its first tokens it shares with others, at least a page and less than all of it."""
    return {prompt: _common(cluster) for cluster in _alike(prompts, 0) for prompt in cluster}


def _put_on_bases(groups: Sequence[Group], base: Group | None = None) -> None:
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


def _alike(prompts: Sequence[tuple[int, ...]], start: int) -> list[list[tuple[int, ...]]]:
    """Prompts with the same page of tokens from `start` on and more after it, those that are not the only one."""
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt in prompts:
        if len(prompt) > start + PAGE:
            alike.setdefault(prompt[start : start + PAGE], []).append(prompt)
    return [cluster for cluster in alike.values() if len(cluster) > 1]


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens are the same in all, less than all of any."""
    first, last = min(prompts), max(prompts)  # in order: these differ the earliest
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(length, min(map(len, prompts)) - 1)

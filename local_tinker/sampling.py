"""SamplingClient: text and log-probs from weights that never change.

Shapes: P prompts, G completions a prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, overload

from .data.render import Renderer
from .engine.base import BaseInfo, Engine, SnapshotInfo
from .errors import UsageError
from .keywords import known_keywords
from .notices import Notices
from .progress import sampling_progress
from .sampler.sequence import Delta, Finished, Request, SamplingParams, derive_seed
from .sampler.stop import stop_rules
from .types import Completion, ModelInput

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | ModelInput


class TextStream(Iterator[str]):
    """The text of one completion as it comes; whole characters only.

    Attributes:
        completion: the whole completion once its text has ended, None before.
    """

    def __init__(self, events: Iterator[Delta | Finished], weights_version: str) -> None:
        self._events, self._version = events, weights_version
        self.completion: Completion | None = None

    def __next__(self) -> str:
        for event in self._events:
            if isinstance(event, Finished):
                self.completion = event.completion(weights_version=self._version)
            elif event.text:
                return event.text
        raise StopIteration

    def close(self) -> None:
        """Stop early."""
        self._events = iter(())  # events that nobody holds are closed


class SamplingClient:
    """Samples from one snapshot; made by a `TrainingClient` or by `ServiceClient.create_sampling_client`.

    A string prompt is text, a list of messages is a chat, ids are ids. Log-probs are those of the full, untempered
    distribution whatever the settings.
    """

    def __init__(
        self,
        engine: Engine,
        snapshot: SnapshotInfo,
        base: BaseInfo,
        renderer: Renderer,
        *,
        trained_on: frozenset[str],
        say: Notices,
    ) -> None:
        self._close = weakref.finalize(self, engine.release, "snapshot", snapshot.id)
        self._engine, self._snapshot, self._base = engine, snapshot, base
        self._renderer, self._trained_on, self._say = renderer, trained_on, say
        self._unseeded = 0  # requests without a seed so far

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the base model."""
        return self._base.tokenizer

    @property
    def weights_version(self) -> str:
        """Names these weights; every completion carries it."""
        return self._snapshot.version

    @known_keywords
    def close(self) -> None:
        """Let the snapshot's memory go. Also happens when the client is garbage collected."""
        self._close()

    @known_keywords
    def sample(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Any = None,
        deterministic: bool = False,
    ) -> Completion:
        """One completion of one prompt.

        Args:
            prompt: a string (continued as text), messages (answered as a chat), token ids or a `ModelInput`.
            max_tokens: at most this many new tokens.
            temperature: 0 takes the most likely token.
            top_p, top_k, min_p: filters, off by default; they change what is drawn, never the log-probs.
            seed: the same seed gives the same completion, alone or in a batch (CPU, float32).
            stop: strings or token ids besides the model's own; [] stops at nothing, not even the model's own.
            deterministic: on a card too, the same seed gives the same completion alone or in a batch. Steps then have a
                fixed size, which costs speed; on a CPU in float32 it changes nothing.

        Raises:
            UsageError: settings out of range, or a prompt that leaves no room in the model's context.
        """
        params = _params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
        (group,) = self._collect([prompt], 1, params, deterministic)
        return group[0]

    @overload
    def sample_batch(self, prompts: Sequence[Prompt], n: None = None, **settings: Any) -> list[Completion]: ...
    @overload
    def sample_batch(self, prompts: Sequence[Prompt], n: int, **settings: Any) -> list[list[Completion]]: ...

    @known_keywords
    def sample_batch(
        self,
        prompts: Sequence[Prompt],
        n: int | None = None,
        *,
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Any = None,
        deterministic: bool = False,
    ):
        """Completions of several prompts, in the prompts' order.

        Args:
            n: None gives one `Completion` a prompt (P,); a number always gives groups, a list of n a prompt (P, G).
                The other arguments are those of `sample`.
        """
        if isinstance(prompts, (str, bytes, Mapping, ModelInput)) or not isinstance(prompts, Iterable):
            raise UsageError(
                f"sample_batch takes a list of prompts, got one {type(prompts).__name__}; use sample, or put it in a list"
            )
        prompts = list(prompts)
        if prompts and isinstance(prompts[0], Mapping):
            raise UsageError(
                "sample_batch takes a list of prompts, got one conversation; use sample, or put it in a list"
            )
        params = _params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
        groups = self._collect(prompts, 1 if n is None else n, params, deterministic)
        return [group[0] for group in groups] if n is None else groups

    @known_keywords
    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Any = None,
        deterministic: bool = False,
    ) -> TextStream:
        """The text of one completion as it comes, and the completion at its end. Arguments are those of `sample`."""
        params = _params(max_tokens, temperature, top_p, top_k, min_p, seed, stop)
        requests = self._requests([prompt], 1, params)
        events = self._engine.sample(
            self._snapshot.id, requests, stream=True, deterministic=deterministic, say=self._say
        )
        return TextStream(events, self._snapshot.version)

    @known_keywords
    def compute_logprobs(self, prompt: Prompt) -> list[float | None]:
        """Log-prob of each of the prompt's tokens given those before it; None for the first, which nothing precedes."""
        return self._engine.compute_logprobs(self._snapshot.id, self.prompt_tokens(prompt))

    @known_keywords
    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """The ids this client feeds for a prompt: exactly those that training puts before an answer."""
        if isinstance(prompt, ModelInput) or hasattr(prompt, "to_ints"):
            return list(prompt.to_ints())
        if isinstance(prompt, str):
            if self._trained_on == {"conversation"}:
                self._say(
                    "the adapter was trained on conversations and is prompted with a plain string; "
                    'for an answer in the trained form pass [{"role": "user", "content": ...}]'
                )
            return self._renderer.generation_prompt(prompt)
        if isinstance(prompt, Mapping):
            raise UsageError("a prompt is a list of messages, got one message; put it in a list")
        # bytes and sets hold whole numbers too, in no order that was meant
        ordered = isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, Set))
        items = list(prompt) if ordered else []
        if items and all(isinstance(item, Mapping) for item in items):
            return self._renderer.generation_prompt(items)
        if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return items
        kinds = ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"
        got = f"a list of {kinds}" if ordered else type(prompt).__name__
        raise UsageError(f"a prompt is a string, a list of messages or a list of token ids; got {got}")

    def _requests(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[Request]:
        """All prompts are read before the first unseeded draw is counted, so a bad one costs none."""
        rules = stop_rules(params.stop, model_stop_ids=self._renderer.stop_ids)
        seeds = [params.seed] * len(prompts)
        if params.seed is None:
            seeds = [derive_seed(self._snapshot.seed, self._unseeded + i) for i in range(len(prompts))]
        tokens = [tuple(self.prompt_tokens(prompt)) for prompt in prompts]
        requests = [Request(ids, params, rules, seed=seed, n=n) for ids, seed in zip(tokens, seeds, strict=True)]
        if params.seed is None:
            self._unseeded += len(prompts)
        return requests

    def _collect(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams, deterministic: bool
    ) -> list[list[Completion]]:
        requests = self._requests(prompts, n, params)
        if not requests:
            return []
        results: list[list[Any]] = [[None] * n for _ in requests]
        with sampling_progress(len(requests) * n) as progress:
            events = self._engine.sample(
                self._snapshot.id, requests, progress=progress, deterministic=deterministic, say=self._say
            )
            for event in events:
                if isinstance(event, Finished):
                    results[event.request][event.sample] = event.completion(weights_version=self._snapshot.version)
        return results


def _params(max_tokens, temperature, top_p, top_k, min_p, seed, stop) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )

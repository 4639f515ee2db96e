"""Examples -> token ids and which of them are trained.

The trained tokens of a chat are found in the rendered text itself: an assistant turn is what the template puts after
the generation prompt, through its stop token. No marker strings, and padding plays no part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import DatasetError, ModelError
from . import messages as chat
from .template import MARK, ChatTemplate, Messages


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether it is a target.

    Attributes:
        parts: the trained runs as (start, stop) token positions; the prompt is what lies before the first.
    """

    tokens: list[int]
    trained: list[bool]

    @property
    def parts(self) -> list[tuple[int, int]]:
        runs, start = [], None
        for index, trained in enumerate([*self.trained, False]):
            if trained and start is None:
                start = index
            elif not trained and start is not None:
                runs.append((start, index))
                start = None
        return runs

    @property
    def prompt_length(self) -> int:
        return self.trained.index(True) if True in self.trained else len(self.tokens)


class Notices:
    """Things to say once: a message whose key was given before is dropped."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._waiting: list[str] = []

    def __call__(self, message: str, *, key: str | None = None) -> None:
        if (key or message) not in self._keys:
            self._keys.add(key or message)
            self._waiting.append(message)

    def take(self) -> list[str]:
        """What was not yet taken."""
        taken, self._waiting = self._waiting, []
        return taken


@dataclass(frozen=True)
class _View:
    """An assistant turn as it would be sampled: `before` is asked, `answer` is given, its stop token included."""

    index: int
    before: str
    answer: str
    stopped: bool


class Renderer:
    """Turns text and chats into tokens for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: the model's stop ids (its generation_config); the tokenizer's EOS and the template's turn end are
            added, and `stop_ids` holds them all.

    Attributes:
        template_origin: "model" or "built-in"; `template` is its text, to be saved with an adapter.
        notices: what happened that a user should read once.
    """

    def __init__(self, tokenizer: Any, *, stop_ids: Iterable[int] = frozenset()) -> None:
        self.tokenizer, self.notices = tokenizer, Notices()
        self.eos_id: int | None = tokenizer.eos_token_id
        self.prefix_ids, suffix_ids = self._affixes()
        self._joins = self.decode([*self._raw("a"), *self._raw("b")]) == "ab"
        self._specials = self._special_tokens()
        self._special_text = re.compile(
            "|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) or "(?!)"
        )
        self._chat = ChatTemplate(tokenizer, adds_bos=tokenizer.bos_token_id in self.prefix_ids)
        known = {int(i) for i in stop_ids} | ({self.eos_id} if self.eos_id is not None else set())
        # Ids the tokenizer itself puts at the end of a text, of which EOS is the usual one, are not part of a prompt.
        self.stop_ids = frozenset(known | set(suffix_ids))
        self.stop_ids |= self._turn_end()
        self._stop_texts = [text for text, i in self._specials.items() if i in self.stop_ids]
        if self.template_origin == "built-in":
            self.notices("the model has no chat template: using the built-in plain one, whose turns end with EOS")

    @property
    def template_origin(self) -> str:
        return self._chat.origin

    @property
    def template(self) -> str | None:
        return self._chat.source

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens shown."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # Plain strings

    def text(self, text: str) -> Encoded:
        """What the tokenizer puts first, the text, EOS once; every token but the first is trained."""
        ids = self._with_prefix(self._raw(self._without_eos(text)))
        return _encoded([(ids[:1], False), ([*ids[1:], self._eos()], True)])

    def prompt_completion(self, prompt: str, completion: str) -> Encoded:
        """The two tokenised apart, so that no token spans the boundary; the completion and its EOS are trained."""
        return _encoded([(self.generation_prompt(prompt), False), (self._answer(completion), True)])

    def _answer(self, completion: str) -> list[int]:
        return [*self._continue(self._without_eos(completion)), self._eos()]

    def _without_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        while eos and text.rstrip().endswith(eos):
            text = text.rstrip()[: -len(eos)]
        return text

    def _eos(self) -> int:
        if self.eos_id is None:
            raise ModelError("the tokenizer has no EOS token, so an answer could never end; set tokenizer.eos_token")
        return self.eos_id

    # Chats

    def conversation(self, messages: Messages, tools: list | None = None, *, context: int = 0) -> Encoded:
        """The chat as one sequence; every assistant turn after the first `context` messages is trained.

        Raises:
            DatasetError: where the template needs one sequence a turn (see `turns`), refuses the chat, or drops part
                of it.
        """
        found = self.turns(messages, tools, context=context)
        if len(found) > 1:
            raise DatasetError(
                "the chat template writes earlier assistant turns differently from the last (it is not "
                "prefix-preserving), so this conversation is not one sequence; use turns()"
            )
        return found[0]

    def turns(self, messages: Messages, tools: list | None = None, *, context: int = 0) -> list[Encoded]:
        """As `conversation`, but one sequence for every trained turn where the template is not prefix-preserving."""
        plain, tools = (
            [self._neutral(message) for message in chat.normalise(messages)],
            self._plain(tools, "tools", "tools") or None,
        )
        trained = [
            index
            for index, message in enumerate(plain)
            if index >= context and message["role"] == "assistant" and message.get("weight", 1)
        ]
        views = {view.index: view for view in self._views(plain[: trained[-1] + 1] if trained else [], tools)}
        if trained[:1] == [0] and 0 not in views:
            self.notices("the chat template cannot ask for an opening assistant turn: such turns are not trained")
            trained = trained[1:]
        if not trained:
            raise DatasetError("0 trained tokens: no assistant message to train on", field="messages")
        for index in trained:
            self._check_turn(plain[: index + 1], tools, views.get(index))
        text = views[trained[-1]].before + views[trained[-1]].answer
        if all(self._within(text, views[index], last=index == trained[-1]) for index in trained):
            return [self._encode(text, views, set(trained))]
        self.notices(
            "the chat template changes earlier assistant turns (it strips reasoning, say): every assistant turn is "
            "trained as a sequence of its own, rendered as the last turn"
        )
        ends = [(index, views[index].before + views[index].answer) for index in trained]
        return [self._encode(text, {k: v for k, v in views.items() if k <= index}, {index}) for index, text in ends]

    def generation_prompt(self, prompt: str | Messages, tools: list | None = None) -> list[int]:
        """The ids a model is given before it answers: exactly those that training puts before the answer."""
        if isinstance(prompt, str):
            return self._with_prefix(self._raw(prompt))
        plain = [self._neutral(message) for message in chat.normalise(prompt, field="prompt")]
        tools = self._plain(tools, "tools", "tools") or None
        text = self._chat.render(plain, tools, ask=True)
        self._chat.check_context(plain, tools, text)
        views = {view.index: view for view in self._views(plain, tools)}
        return self._encode(text, views, set()).tokens

    def _views(self, messages: Messages, tools: list | None) -> list[_View]:
        """Every assistant turn whose generation prompt is the beginning of its own rendering."""
        views = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._chat.render(messages[:index], tools, ask=True)
            except DatasetError:
                if index:
                    raise
                continue
            after = self._chat.render(messages[: index + 1], tools, ask=False)
            if not after.startswith(before):
                continue
            answer, end = after[len(before) :], None
            for stop in self._stop_texts:
                place = answer.find(stop)
                if place >= 0 and (end is None or place + len(stop) < end):
                    end = place + len(stop)
            views.append(_View(index, before, answer.rstrip() if end is None else answer[:end], end is not None))
        return views

    def _check_turn(self, messages: Messages, tools: list | None, view: _View | None) -> None:
        if view is None:
            raise DatasetError(
                "the chat template's generation prompt is not how it begins this assistant turn, so the model would be "
                "trained on an answer to a prompt it is never asked; put the reasoning it expects into the message, or "
                "use another template",
                field=f"messages[{len(messages) - 1}]",
            )
        self._chat.check_context(messages, tools, view.before)
        self._chat.check_answer(messages, tools, view.answer)
        if "\\ufdd0" in view.before + view.answer:
            raise DatasetError("special-token text in a message that this chat template escapes; remove it")

    def _within(self, text: str, view: _View, *, last: bool) -> bool:
        """Whether the turn stands in the whole text as it would be sampled."""
        whole = view.before + view.answer
        return text.startswith(whole) and (view.stopped or last or bool(self._next_stop(text, len(whole))))

    def _next_stop(self, text: str, position: int) -> str:
        """The stop token right at `position`: some templates end a turn only by beginning the next."""
        return next((stop for stop in self._stop_texts if text.startswith(stop, position)), "")

    def _encode(self, text: str, views: Mapping[int, _View], trained: set[int]) -> Encoded:
        spans = []
        for view in views.values():
            start, stop = len(view.before), len(view.before) + len(view.answer)
            if stop <= len(text) and text.startswith(view.before + view.answer):
                stop += 0 if view.stopped else len(self._next_stop(text, stop))
                spans.append((start, stop, view.index in trained))
        cuts = [0, *(edge for start, stop, _ in spans for edge in (start, stop)), len(text)]
        pieces = self._segments(text, cuts)
        flags = [flag for _, _, wanted in spans for flag in (False, wanted)] + [False]
        pieces[0] = self._with_prefix(pieces[0])
        final = views.get(max(trained)) if trained else None
        if final is not None and not final.stopped and pieces[-2][-1:] != [self._eos()]:
            self.notices("the chat template ends an answer with no stop token: EOS is trained there")
            pieces[-2] = [*pieces[-2], self._eos()]
        return _encoded(list(zip(pieces, flags, strict=True)))

    # Text to ids

    def _raw(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _continue(self, text: str) -> list[int]:
        """Ids of text that follows other text; some tokenizers put a space before whatever comes first."""
        if self._joins or not text:
            return self._raw(text)
        anchor = self._raw("\n")
        whole = self._raw("\n" + text)
        return whole[len(anchor) :] if anchor and whole[: len(anchor)] == anchor else self._raw(text)

    def _plain_ids(self, text: str) -> list[int]:
        head, *tail = text.split(MARK)
        return [*self._raw(head), *(i for part in tail for i in self._continue(part))]

    def _segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """Ids of the pieces between the cuts. The ids before a cut never depend on the text after it."""
        spans = list(pairwise(cuts))
        if self._joins:
            return [self._plain_ids(text[start:stop]) for start, stop in spans]
        ids: list[int] = []
        pieces = []
        for start, stop in spans:
            whole = self._plain_ids(text[:stop])
            # Where a token spans the cut, the piece is tokenised by itself.
            kept = whole[: len(ids)] == ids
            piece = whole[len(ids) :] if kept else [i for p in text[start:stop].split(MARK) for i in self._continue(p)]
            pieces.append(piece)
            ids = [*ids, *piece]
        return pieces

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """The ids with what the tokenizer puts first (BOS), exactly once."""
        bos, count = self.tokenizer.bos_token_id, len(self.prefix_ids)
        if bos is not None and ids[:2] == [bos, bos]:
            self.notices("the text begins with two BOS tokens: one is kept")
            while ids[:2] == [bos, bos]:
                ids = ids[1:]
        return ids if ids[:count] == self.prefix_ids else [*self.prefix_ids, *ids]

    def _affixes(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text by itself."""
        bare, whole = self._raw("a"), list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []

    def _special_tokens(self) -> dict[str, int]:
        table = getattr(self.tokenizer, "added_tokens_decoder", {})
        found = {str(token): int(i) for i, token in table.items() if getattr(token, "special", False)}
        ids = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=False)
        return {**{str(token): int(i) for token, i in ids}, **found}

    def _neutral(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with special-token text made plain: content can never hold a control token."""
        role = message["role"]
        return {key: value if key == "role" else self._plain(value, role, key) for key, value in message.items()}

    def _plain(self, value: Any, role: str, field: str) -> Any:
        if isinstance(value, str):
            if MARK in value:
                raise DatasetError("the noncharacter U+FDD0; remove it", field=field)
            return self._special_text.sub(lambda match: self._broken(match[0], role), value)
        if isinstance(value, Mapping):
            return {key: self._plain(item, role, f"{field}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item, role, field) for item in value]
        return value

    def _broken(self, text: str, role: str) -> str:
        if role == "assistant" and "think" in text.lower():
            return text
        self.notices(
            f"special-token text such as {text!r} inside messages is encoded as plain text", key="special text"
        )
        return text[0] + MARK + text[1:]

    def _turn_end(self) -> frozenset[int]:
        """The special token the template puts right after an answer, where the model's stop ids lack it."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            asked = self._chat.render([user], None, ask=True)
            silent = self._chat.render([user], None, ask=False)
            tail = self._chat.render([user, answer], None, ask=False).rpartition("b")[2].lstrip()
        except DatasetError:
            return frozenset()
        token = next((text for text in sorted(self._specials, key=len, reverse=True) if tail.startswith(text)), None)
        begins_next = token is not None and asked.removeprefix(silent).lstrip().startswith(token)
        if token is None or begins_next or self._specials[token] in self.stop_ids:
            return frozenset()
        self.notices(f"the chat template ends a turn with {token!r}, which the model's stop ids lack: added to them")
        return frozenset({self._specials[token]})


def _encoded(pieces: Sequence[tuple[list[int], bool]]) -> Encoded:
    tokens = [i for ids, _ in pieces for i in ids]
    trained = [flag for ids, flag in pieces for _ in ids]
    # Nothing comes before the first token, so nothing predicts it.
    trained[:1] = [False] * len(trained[:1])
    return Encoded(tokens, trained)

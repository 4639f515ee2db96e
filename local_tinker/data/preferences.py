"""Preference rows: two answers to one prompt, however the prompt is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import messages as chat
from .examples import Messages, Preference
from .fields import string, tools
from .rows import RowSource, fail


def from_preference(row: Mapping[str, Any], source: RowSource | None) -> Preference:
    """`chosen` and `rejected` with a prompt column, or as whole conversations that share their beginning."""
    given = {name: row.get(name) for name in ("prompt", "chosen", "rejected")}
    if isinstance(given["chosen"], str) and isinstance(given["rejected"], str):
        return _strings(row, source)
    prompt: Messages = []
    if given["prompt"] is not None:
        prompt = _prompt_messages(given["prompt"], "prompt", source)
    return split_preference(prompt, row, source)


def _prompt_messages(value: Any, field: str, source: RowSource | None) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return chat.normalise(value, field=field, source=source)


def _strings(row: Mapping[str, Any], source: RowSource | None) -> Preference:
    chosen, rejected = string(row, "chosen", source), string(row, "rejected", source)
    if row.get("prompt") is not None:
        if not isinstance(row["prompt"], str):
            message = (
                "prompt is a message list but chosen and rejected are strings; give chosen and rejected as messages"
            )
            raise fail(message, source=source, field="prompt")
        prompt = row["prompt"]
        if prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = min(len(chosen), len(rejected)) if shared is None else shared
        # Back to the start of the word the two differ in; its leading space belongs to the answer.
        while shared and not chosen[shared : shared + 1].isspace():
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt.strip() and chosen != rejected:
            message = (
                "no prompt column, and chosen and rejected share no beginning: the prompts differ between the sides"
            )
            raise fail(message, source=source, field="prompt")
    if chosen == rejected:
        raise fail("chosen and rejected are the same; leave the pair out", source=source, field="rejected")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise fail("empty: nothing to train; leave the pair out", source=source, field=name)
    return Preference(prompt, chosen, rejected, source=source)


def _side(value: Any, name: str, source: RowSource | None) -> Messages:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping) and ("value" in value or "content" in value):
        value = [value]
    elif not isinstance(value, list | tuple | Mapping):
        message = f"expected an answer (a string or messages), got {chat.type_name(value)} {value!r}"
        raise fail(message[:200], source=source, field=name)
    return chat.normalise(value, field=name, source=source)


def split_preference(
    prompt: Messages, row: Mapping[str, Any], source: RowSource | None, *, offered: list | None = None
) -> Preference:
    chosen, rejected = (_side(row[name], name, source) for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == chat.common_prefix(chosen, rejected):
        raise fail("chosen and rejected are the same; leave the pair out", source=source, field="rejected")
    whole = [side for side in (chosen, rejected) if side[0]["role"] != "assistant"]
    if whole:
        shared = chat.common_prefix(chosen, rejected)
        # An assistant turn both sides begin with is context only if something else follows it on both.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        head, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not head or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            message = "the prompts differ between chosen and rejected: they must share every message before the answers"
            raise fail(message, source=source, field="rejected")
        asked = [message for message in prompt if message["role"] == "user"]
        if asked and not any(message["content"].strip() == asked[-1]["content"].strip() for message in head):
            raise fail("prompt disagrees with the conversations in chosen and rejected", source=source, field="prompt")
        prompt = head
    if not prompt:
        raise fail("no prompt: add a prompt column, or whole conversations", source=source, field="prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        chat.require_answer(side, field=name, source=source)
    return Preference(prompt, chosen, rejected, offered or tools(row, source), source)

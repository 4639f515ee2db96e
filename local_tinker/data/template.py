"""A tokenizer's chat template as text: rendering, the built-in plain one, and what a template must not lose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DatasetError, LocalTinkerError, MissingDependencyError

Messages = Sequence[Mapping[str, Any]]

# Put inside special-token text that stands in a message, so that no tokenizer reads it as a control token. A Unicode
# noncharacter: valid text never holds it.
MARK = "\ufdd0"
REASONING = ("reasoning_content", "thinking", "reasoning")

_PLAIN = """\
{%- for message in messages -%}
{%- if message.tool_calls -%}{{ raise_exception("the built-in plain template has no tool calls") }}{%- endif -%}
{%- if message.role == "assistant" -%}
{{ "Assistant:\\n" + message.content + eos_token + "\\n\\n" }}
{%- elif message.role == "user" -%}
{{ "User:\\n" + message.content + "\\n\\n" }}
{%- elif message.role in ["system", "developer"] -%}
{{ "Instructions:\\n" + message.content + "\\n\\n" }}
{%- else -%}
{{ raise_exception("the built-in plain template has no role " + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "Assistant:\\n" }}{%- endif -%}
"""


def built_in(*, adds_bos: bool) -> str:
    """The template for a model that has none: labelled turns, each answer ended by the tokenizer's own EOS."""
    return ("{{- bos_token -}}\n" if adds_bos else "") + _PLAIN


class ChatTemplate:
    """Messages -> text.

    Attributes:
        origin: "model" or "built-in".
        source: the template text to save beside an adapter; None where the model's own has several named parts.
    """

    def __init__(self, tokenizer: Any, *, adds_bos: bool) -> None:
        own = getattr(tokenizer, "chat_template", None)
        self._tokenizer, self.origin = tokenizer, "model" if own else "built-in"
        self._override = None if own else built_in(adds_bos=adds_bos)
        self.source = self._override or (own if isinstance(own, str) else None)

    def render(self, messages: Messages, tools: list | None, *, ask: bool) -> str:
        """The conversation as text, with the generation prompt after it when `ask`."""
        clean = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                clean, tools=tools, tokenize=False, add_generation_prompt=ask, chat_template=self._override
            )
        except LocalTinkerError:
            raise
        except ImportError as error:
            raise MissingDependencyError(f"chat templates need jinja2 ({error}): pip install jinja2") from error
        # A template is a program of the model's author: it may raise anything.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DatasetError(f"the chat template refused this conversation ({roles}): {error}") from error

    def uses(self, messages: Messages, changed: Messages, tools: list | None) -> bool:
        """Whether the text differs between the two conversations: False means the template ignores the change."""
        try:
            return self.render(messages, tools, ask=False) != self.render(changed, tools, ask=False)
        except DatasetError:
            return True

    def check_context(self, messages: Messages, tools: list | None, text: str) -> None:
        """Every message that is not an assistant's, and the tools, must be in the text."""
        for index, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant" or not content or content in text or _as_json(content) in text:
                continue
            if not self.uses(messages, _replaced(messages, index, content=content + " x"), tools):
                raise _dropped(f"the {message['role']} message", f"messages[{index}].content")
        if tools and not self._uses_tools(messages, tools):
            raise _dropped("the tools", "tools")

    def _uses_tools(self, messages: Messages, tools: list) -> bool:
        try:
            return self.render(messages, tools, ask=False) != self.render(messages, None, ask=False)
        except DatasetError:
            return True

    def check_answer(self, messages: Messages, tools: list | None, answer: str) -> None:
        """The last message, an assistant's, must be whole in `answer`: content, reasoning and every tool call."""
        index, message = len(messages) - 1, messages[-1]
        head, closed, tail = message["content"].rpartition("</think>")
        pieces = [head.replace("<think>", ""), tail] if closed else [message["content"]]
        for piece in (piece.strip() for piece in pieces):
            if piece and piece not in answer and _as_json(piece) not in answer:
                what = "the reasoning" if closed and piece != tail.strip() else "the assistant's content"
                raise _dropped(what, f"messages[{index}].content")
        for key in REASONING:
            if message.get(key) and str(message[key]).strip() not in answer:
                raise _dropped("the reasoning", f"messages[{index}].{key}")
        calls = message.get("tool_calls") or ()
        for number, call in enumerate(calls):
            renamed = {**call["function"], "name": call["function"]["name"] + "_x"}
            emptied = {**call["function"], "arguments": {"x": "x"}}
            for function in (renamed, emptied):
                other = [*calls[:number], {**call, "function": function}, *calls[number + 1 :]]
                if not self.uses(messages, _replaced(messages, index, tool_calls=other), tools):
                    raise _dropped("a tool call", f"messages[{index}].tool_calls[{number}]")


def _replaced(messages: Messages, index: int, **changes: Any) -> list[dict[str, Any]]:
    return [*messages[:index], {**messages[index], **changes}, *messages[index + 1 :]]


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _dropped(what: str, field: str) -> DatasetError:
    return DatasetError(
        f"the chat template drops {what}: it would be lost without a word. Put it into the content, or use a model "
        "whose template renders it",
        field=field,
    )

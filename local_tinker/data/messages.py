"""Message lists in the forms people write them -> dicts of `role`, `content` (str) and what else they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DatasetError
from .rows import RowSource, fail

ROLES = ("system", "developer", "user", "assistant", "tool")
_SYNONYMS = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_IMAGE_PARTS = ("image", "image_url", "input_image", "video", "audio", "input_audio")


def type_name(value: Any) -> str:
    return type(value).__name__


def normalise(value: Any, *, field: str = "messages", source: RowSource | None = None) -> list[dict[str, Any]]:
    """A list of messages as chat templates read it.

    Accepts `role`/`content`, sharegpt's `from`/`value`, content as a list of text parts, tool calls as lists or JSON
    strings, a dict of equally long lists, and the whole list as a JSON string. Keys we do not know are kept.

    Raises:
        DatasetError: naming the field, such as ``messages[2].content``.
    """
    value = _as_list(value, field, source)
    if not value:
        raise fail("no messages", source=source, field=field)
    return [_message(message, f"{field}[{index}]", source) for index, message in enumerate(value)]


def _as_list(value: Any, field: str, source: RowSource | None) -> list:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise fail("expected a list of messages, got a string", source=source, field=field) from None
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [{key: column[i] for key, column in value.items()} for i in range(lengths.pop())]
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise fail(f"expected a list of messages, got {type_name(value)}", source=source, field=field)
    return list(value)


def _message(message: Any, field: str, source: RowSource | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise fail(f"expected a message object, got {type_name(message)}", source=source, field=field)
    out = {key: item for key, item in message.items() if item is not None}
    role_key, content_key = ("from", "value") if "role" not in out and "from" in out else ("role", "content")
    role = out.pop(role_key, None)
    content = out.pop(content_key, None)
    if role is None:
        found = ", ".join(map(str, message)) or "nothing"
        raise fail(f"a message needs role and content (or from and value); it has: {found}", source=source, field=field)
    if role == "function_call":
        calls = _tool_calls(content, f"{field}.{content_key}", source)
        return {"role": "assistant", "content": "", "tool_calls": calls, **out}
    role = _SYNONYMS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise fail(
            f"unknown role {role!r}; allowed: {', '.join(ROLES)} (also: {', '.join(sorted(_SYNONYMS))}, function_call)",
            source=source, field=f"{field}.{role_key}",
        )  # fmt: skip
    if out.get("tool_calls"):
        out["tool_calls"] = _tool_calls(out["tool_calls"], f"{field}.tool_calls", source)
    else:
        out.pop("tool_calls", None)
    text = _content(content, f"{field}.{content_key}", source, may_be_absent="tool_calls" in out)
    if role == "assistant" and not text.strip() and "tool_calls" not in out:
        raise fail(
            "an assistant message without content and without tool_calls", source=source, field=f"{field}.content"
        )
    if out.get("weight", 1) not in (0, 1):
        raise fail(f"weight must be 0 or 1, got {out['weight']!r}", source=source, field=f"{field}.weight")
    return {"role": role, "content": text, **out}


def _content(content: Any, field: str, source: RowSource | None, *, may_be_absent: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if content is None:
        raise fail("no content", source=source, field=field)
    if isinstance(content, Sequence):
        return "".join(_part(part, f"{field}[{index}]", source) for index, part in enumerate(content))
    raise fail(f"content must be a string, got {type_name(content)} {content!r}", source=source, field=field)


def _part(part: Any, field: str, source: RowSource | None) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type", "text" if "text" in part else None)
        if kind in _IMAGE_PARTS or any(part.get(key) is not None for key in _IMAGE_PARTS):
            raise fail(
                f"images not supported (a part of type {kind!r}); only text parts are", source=source, field=field
            )
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            return part["text"]
    raise fail(f"expected a text part, got {part!r}"[:200], source=source, field=field)


def _tool_calls(value: Any, field: str, source: RowSource | None) -> list[dict[str, Any]]:
    """`[{"type": "function", "function": {"name", "arguments": dict}}]` from the usual ways of writing it."""
    value = _from_json(value, field, source)
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list) or not calls:
        raise fail(f"expected a tool call or a list of them, got {type_name(value)}", source=source, field=field)
    return [_tool_call(call, f"{field}[{index}]", source) for index, call in enumerate(calls)]


def _tool_call(call: Any, field: str, source: RowSource | None) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise fail(f"a tool call needs a name, got {call!r}"[:200], source=source, field=field)
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    rest = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {**rest, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _from_json(value: Any, field: str, source: RowSource | None) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise fail(f"not valid JSON: {error}", source=source, field=field) from None


def tools_of(value: Any, *, source: RowSource | None = None, field: str = "tools") -> list[dict[str, Any]] | None:
    """The `tools` column, a list or a JSON string; None when it is empty."""
    value = _from_json(value, field, source) if value not in (None, "") else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise fail(f"tools must be a list of objects or that as JSON, got {value!r}"[:200], source=source, field=field)
    return [dict(tool) for tool in value]


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Two normalised messages that say the same."""
    return all(a.get(key) == b.get(key) for key in ("role", "content", "tool_calls"))


def common_prefix(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> int:
    """How many leading messages two conversations share."""
    length = 0
    while length < min(len(a), len(b)) and same(a[length], b[length]):
        length += 1
    return length


def require_answer(messages: Sequence[Mapping[str, Any]], *, field: str, source: RowSource | None) -> None:
    """A conversation without an assistant turn trains nothing."""
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DatasetError(
            f"0 trained tokens: no assistant message to train on (roles: {roles})",
            path=source.path if source else None, line=source.line if source else None, field=field,
        )  # fmt: skip

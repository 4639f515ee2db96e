"""Row shapes -> normalised examples: one function a shape, chosen by the columns and by what the loss needs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DatasetError
from . import messages as chat
from .examples import Conversation, Example, Preference, Prompt, PromptCompletion, Text
from .fields import string, tools
from .preferences import from_preference, split_preference
from .rows import RowSource, fail

Say = Callable[[str], None]


def _from_messages(row: Mapping[str, Any], source: RowSource | None, column: str = "messages") -> Conversation:
    messages = chat.normalise(row[column], field=column, source=source)
    system = row.get("system") if column == "conversations" else None
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": string(row, "system", source)}, *messages]
    return Conversation(messages, tools(row, source), source=source)


def _from_conversations(row: Mapping[str, Any], source: RowSource | None) -> Conversation:
    return _from_messages(row, source, "conversations")


def _from_prompt_completion(row: Mapping[str, Any], source: RowSource | None) -> PromptCompletion | Conversation:
    kinds = {name: isinstance(row[name], str) for name in ("prompt", "completion")}
    if kinds["prompt"] != kinds["completion"]:
        given = ", ".join(f"{name} is {chat.type_name(row[name])}" for name in kinds)
        message = f"prompt and completion must both be strings or both be message lists; {given}"
        raise fail(message, source=source, field="completion")
    if kinds["prompt"]:
        return PromptCompletion(string(row, "prompt", source, empty=True), string(row, "completion", source), source)
    prompt = chat.normalise(row["prompt"], field="prompt", source=source)
    completion = chat.normalise(row["completion"], field="completion", source=source)
    return Conversation([*prompt, *completion], tools(row, source), context=len(prompt), source=source)


def _from_alpaca(row: Mapping[str, Any], source: RowSource | None) -> Conversation:
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": string(row, "system", source)})
    for index, pair in enumerate(row.get("history") or ()):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise fail("history must hold [question, answer] pairs", source=source, field=f"history[{index}]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = string(row, "instruction", source, empty=bool(row.get("input")))
    if row.get("input"):
        question = "\n\n".join(filter(None, (question, string(row, "input", source))))
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": string(row, "output", source)})
    return Conversation(messages, source=source)


def _from_question_answer(row: Mapping[str, Any], source: RowSource | None) -> Conversation:
    user = {"role": "user", "content": string(row, "question", source)}
    return Conversation([user, {"role": "assistant", "content": string(row, "answer", source)}], source=source)


def _from_text(row: Mapping[str, Any], source: RowSource | None) -> Text:
    return Text(string(row, "text", source), source)


def _from_conversations_preference(row: Mapping[str, Any], source: RowSource | None) -> Preference:
    conversation = _from_conversations(row, source)
    return split_preference(conversation.messages, row, source, offered=conversation.tools)


def _prompt_only(row: Mapping[str, Any], source: RowSource | None) -> Prompt:
    value = row["prompt"]
    prompt = value if isinstance(value, str) else chat.normalise(value, field="prompt", source=source)
    if not prompt:
        raise fail("empty prompt", source=source, field="prompt")
    return Prompt(prompt, tools(row, source), source)


def _prompt_question(row: Mapping[str, Any], source: RowSource | None) -> Prompt:
    return Prompt([{"role": "user", "content": string(row, "question", source)}], source=source)


def _prompt_messages_row(row: Mapping[str, Any], source: RowSource | None) -> Prompt:
    column = "messages" if row.get("messages") is not None else "conversations"
    conversation = _from_messages(row, source, column)
    messages = conversation.messages
    # The reference answer, where there is one, is not part of what is asked.
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise fail("no user message to answer", source=source, field=column)
    return Prompt(messages, conversation.tools, source)


@dataclass(frozen=True)
class Shape:
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], RowSource | None], Example]


# In each, the first whose columns are all there is read.
SUPERVISED = {
    "messages": Shape(("messages",), ("tools",), _from_messages),
    "sharegpt": Shape(("conversations",), ("system", "tools"), _from_conversations),
    "prompt+completion": Shape(("prompt", "completion"), ("tools",), _from_prompt_completion),
    "alpaca": Shape(("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    "question+answer": Shape(("question", "answer"), (), _from_question_answer),
    "text": Shape(("text",), (), _from_text),
}
PREFERENCES = {
    "sharegpt preference": Shape(
        ("conversations", "chosen", "rejected"), ("system", "tools"), _from_conversations_preference
    ),
    "prompt+chosen+rejected": Shape(("prompt", "chosen", "rejected"), ("tools",), from_preference),
    "chosen+rejected": Shape(("chosen", "rejected"), ("tools",), from_preference),
}
PROMPTS = {
    "prompt": Shape(("prompt",), ("tools",), _prompt_only),
    "messages": Shape(("messages",), ("tools",), _prompt_messages_row),
    "sharegpt": Shape(("conversations",), ("system", "tools"), _prompt_messages_row),
    "question+answer": Shape(("question",), (), _prompt_question),
}
POLICY_LOSSES = ("grpo", "ppo", "importance_sampling", "cispo", "dro")


def shapes_for(loss: str) -> dict[str, Shape]:
    """Pairs for dpo, prompts for the policy losses, answers for every other loss."""
    if loss == "dpo":
        return PREFERENCES
    return PROMPTS if loss in POLICY_LOSSES else SUPERVISED


def _has(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    return all(row.get(column) is not None for column in columns)


def recognise(row: Mapping[str, Any], loss: str = "sft") -> str:
    """The name of the shape this row is read as.

    Raises:
        DatasetError: with the columns found, the nearest shape and how to map to it.
    """
    source = getattr(row, "source", None)
    if not isinstance(row, Mapping):
        raise fail(f"expected a row (a dict of columns), got {chat.type_name(row)}", source=source)
    shapes = shapes_for(loss)
    for name, shape in shapes.items():
        if _has(row, shape.columns):
            return name
    raise fail(_unrecognised(row, loss, shapes), source=source)


def _fits(row: Mapping[str, Any], shapes: Mapping[str, Shape]) -> bool:
    return any(_has(row, shape.columns) for shape in shapes.values())


def _unrecognised(row: Mapping[str, Any], loss: str, shapes: Mapping[str, Shape]) -> str:
    for shape in shapes.values():
        null = [column for column in shape.columns if column in row and row[column] is None]
        if null and all(column in row for column in shape.columns):
            return f"{null[0]!r} is null; fill it in, or leave the row out"
    found = [str(column) for column, value in row.items() if value is not None]

    def nearness(item: tuple[str, Shape]) -> float:
        columns = item[1].columns
        best = [max((difflib.SequenceMatcher(None, c, f).ratio() for f in found), default=0.0) for c in columns]
        return sum(best) / len(columns)

    name, shape = max(shapes.items(), key=nearness)
    missing = [column for column in shape.columns if column not in found]
    spare = [column for column in found if column not in shape.columns]
    pairs, flags = [], []
    for column in shape.columns:
        guess = column
        if column in missing:
            close = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
            guess = close[0] if close else spare[0] if spare else "..."
            spare = [other for other in spare if other != guess]
        pairs.append(f'"{column}": row["{guess}"]')
        flags += [f"{column}={guess}"] if guess != column else []
    fits = next((other for other in ("sft", "dpo") if other != loss and _fits(row, shapes_for(other))), None)
    if fits:
        return f"no shape for loss {loss!r} among the columns {', '.join(found)}; they fit loss {fits!r}"
    known = "; ".join(" + ".join(shape.columns) for shape in shapes.values())
    return (
        f"no shape for loss {loss!r} among the columns {', '.join(found) or '(none)'}. Known: {known}. "
        f"Nearest: {name}, which lacks {', '.join(missing)}. To map: rows = [{{{', '.join(pairs)}}} for row in rows]"
        + ("" if "..." in "".join(flags) else f", or for a recipe --columns {','.join(flags)}")
    )


def to_example(row: Mapping[str, Any], loss: str = "sft", *, shape: str | None = None) -> Example:
    """The row as an example, checked; its other columns must not say something else."""
    source = getattr(row, "source", None)
    name = shape or recognise(row, loss)
    example = shapes_for(loss)[name].convert(row, source)
    if isinstance(example, Conversation):
        chat.require_answer(example.messages[example.context :], field=_main_column(name), source=source)
    if shapes_for(loss) is SUPERVISED:
        _check_others(row, name, source)
    return example


def _main_column(name: str) -> str:
    return SUPERVISED[name].columns[-1]


def _check_others(row: Mapping[str, Any], name: str, source: RowSource | None) -> None:
    """A second shape in the same row is ignored when it holds the same content, and an error when it does not."""
    used = {*SUPERVISED[name].columns, *SUPERVISED[name].optional}
    others = {c for other in SUPERVISED.values() if _has(row, other.columns) for c in other.columns} - used
    if isinstance(row.get("prompt"), str | list):
        others |= {"prompt"} - used
    if not others:
        return
    read = [text for column in used if row.get(column) is not None for text in _column_contents(row[column])]
    for column in sorted(others):
        for text in _column_contents(row[column]):
            # A whole rendering of the row holds all of it; a part of the row is held by some of it.
            if not (any(text in mine for mine in read) or all(mine in text for mine in read)):
                raise fail(
                    f"ambiguous: read as {name}, but the column {column!r} holds something else; drop one of them",
                    source=source, field=column,
                )  # fmt: skip


def _column_contents(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    try:
        return [message["content"].strip() for message in chat.normalise(value) if message["content"].strip()]
    except DatasetError:
        return []


def examples(rows: Iterable[Mapping[str, Any]], loss: str = "sft", *, say: Say | None = None) -> list[Example]:
    """Every row as an example. All must have the shape of the first; what is read and what is ignored is said once."""
    rows, out, first = list(rows), [], None
    for row in rows:
        name = recognise(row, loss)
        first = first or name
        if name != first:
            raise mixed(row, first, name)
        out.append(to_example(row, loss, shape=name))
    if say and first:
        say(f"read as {first} ({used_columns(rows[0], first, loss)}): {len(rows):,} rows")
        unused = unused_columns(rows, first, loss)
        if unused:
            say(f"columns not used: {', '.join(unused)}")
    return out


def mixed(row: Mapping[str, Any], first: str, now: str) -> DatasetError:
    """The error of a row whose shape is not that of the rows before it."""
    return fail(f"mixed rows: the rows before are {first}, this one is {now}", source=getattr(row, "source", None))


def used_columns(row: Mapping[str, Any], shape: str, loss: str) -> str:
    return ", ".join(column for column in _columns(shape, loss) if _has(row, (column,)))


def unused_columns(rows: Iterable[Mapping[str, Any]], shape: str, loss: str) -> list[str]:
    """Columns that hold something and are not read. Further columns of prompts reach the reward function: none."""
    if shapes_for(loss) is PROMPTS:
        return []
    used = _columns(shape, loss)
    return list(
        dict.fromkeys(str(c) for row in rows for c, value in row.items() if c not in used and value is not None)
    )


def _columns(shape: str, loss: str) -> tuple[str, ...]:
    known = shapes_for(loss)[shape]
    return (*known.columns, *known.optional)

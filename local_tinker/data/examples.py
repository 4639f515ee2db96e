"""What a row becomes: the normalised examples the renderer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rows import RowSource

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """Plain text; every token but the first is trained."""

    text: str
    source: RowSource | None = None


@dataclass(frozen=True)
class PromptCompletion:
    """Plain text after plain text; the completion is trained."""

    prompt: str
    completion: str
    source: RowSource | None = None


@dataclass(frozen=True)
class Conversation:
    """A chat. The first `context` messages are given, never trained; of the rest every assistant turn is."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    source: RowSource | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt: three strings, or three message lists."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    source: RowSource | None = None


@dataclass(frozen=True)
class Prompt:
    """What a policy answers: a string, or messages."""

    prompt: str | Messages
    tools: list[dict[str, Any]] | None = None
    source: RowSource | None = None


Example = Text | PromptCompletion | Conversation | Preference | Prompt

"""`local-tinker chat`: talk to a model or to what a run has made of it."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import output
from .target import open_sampler

_HELP = "/reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def chat(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter folder, a hub id, folder or alias.")
    ],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens kept; 1 keeps all.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    quantize: Annotated[str, typer.Option(help="How a model's weights are held: 4bit, 8bit or none.")] = "4bit",
    root: Annotated[str, typer.Option(help="The folder that holds the runs.")] = "runs",
) -> None:
    """Talk to a model: answers appear as they are made. Input may be piped, one message a line."""
    settings = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    sampler = open_sampler(model, settings, root=root, quantize=quantize)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # not on Windows, whose terminal edits by itself
            import readline  # noqa: F401  line editing and history for input()

        output.note(_HELP)
    talk = Talk(sampler, system, settings)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            output.note("\n(Ctrl-D leaves)")
            continue
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            talk.reset()
            output.note("(forgotten)")
        elif line in ("/help", "/?"):
            output.note(_HELP)
        elif line.startswith("/") and " " not in line and line.count("/") == 1:
            output.note(f"no command {line}; {_HELP}")
        elif line:
            talk.answer(line)


class Talk:
    """A conversation and the sampler that goes on with it."""

    def __init__(self, sampler: Any, system: str | None, settings: dict[str, Any]) -> None:
        self._sampler, self._settings = sampler, settings
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def answer(self, line: str) -> None:
        """Print the answer as it comes and remember both; Ctrl-C keeps what has come."""
        self.messages.append({"role": "user", "content": line})
        said: list[str] = []
        try:
            for text in self._sampler.stream(self.messages, **self._settings):
                said.append(text)
                print(text, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            output.note("(stopped)")
        except UsageError as error:
            # most often a conversation that has outgrown the model's context
            self.messages.pop()
            output.error(f"{error}; /reset starts anew")
            return
        if not "".join(said).strip():
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": "".join(said)})

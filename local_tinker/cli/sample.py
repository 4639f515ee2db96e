"""`local-tinker sample`: completions of one prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import output
from .target import open_sampler

if TYPE_CHECKING:
    from ..sampling import TextStream
    from ..types import Completion


def sample(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter folder, a hub id, folder or alias.")
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; without it, or as -, it is read from stdin.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Completions.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens kept; 1 keeps all.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only so many of the likeliest tokens are kept.")] = None,
    min_p: Annotated[float, typer.Option(help="Keeps tokens of this share of the likeliest one's probability.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 512,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to stop at besides the model's own end; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text; without it, it is a chat.")
    ] = False,
    quantize: Annotated[str, typer.Option(help="How a model's weights are held: 4bit, 8bit or none.")] = "4bit",
    root: Annotated[str, typer.Option(help="The folder that holds the runs.")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print completions of one prompt."""
    if n < 1:
        raise UsageError(f"--n must be >= 1, got {n}")
    if raw and system:
        raise UsageError("--system belongs to a chat; leave it or --raw away")
    text = _read(prompt)
    asked = (
        text
        if raw
        else [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
    )
    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": stop or None,
    }
    sampler = open_sampler(model, settings, root=root, quantize=quantize)
    if n == 1 and not json:
        return _show(sampler.stream(asked, **settings))
    (found,) = sampler.sample_batch([asked], n=n, **settings)
    if json:
        fields = ("stop_reason", "tokens", "logprobs", "weights_version")
        output.as_json([{"text": str(c), **{name: getattr(c, name) for name in fields}} for c in found])
        return
    for number, completion in enumerate(found, start=1):
        print(output.paint(f"--- {number} of {n}", "dim", sys.stdout))
        print(completion)
        _note_cut(completion)


def _show(stream: TextStream) -> None:
    """Print the text as it comes; Ctrl-C leaves what has come."""
    try:
        for text in stream:
            print(text, end="", flush=True)
    finally:
        print(flush=True)
    _note_cut(stream.completion)


def _note_cut(completion: Completion) -> None:
    if completion.stop_reason == "length":
        output.note(f"(cut after {len(completion.tokens)} tokens; --max-tokens allows more)")


def _read(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        text = prompt
    elif sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no prompt: give it after the model, such as "Who are you?", or pipe it in')
    else:
        text = sys.stdin.read().rstrip("\n")
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text

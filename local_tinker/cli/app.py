"""The entry point: finds the command, loads its module and nothing else, turns errors into one message and a code."""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence

from ..errors import LocalTinkerError
from . import output

# name -> (module in this package, function, help line), in the order of `--help`: first steps, training, looking back.
# A function's typer annotations are its flags. One whose only parameter is `argv` gets the words as they came.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("quickstart", "quickstart", "Fine-tune a small model on data that ships, and see the difference."),
    "models": ("models", "models", "List models, the memory they need here, and whether they fit."),
    "plan": ("plan", "plan", "Show where a training step's memory goes and what needs less."),
    "run": ("run", "run", "Train: sft, dpo, grpo or ppo, by flags or a config file."),
    "sample": ("sample", "sample", "Print completions of a prompt, from a run or a model."),
    "chat": ("chat", "chat", "Talk to a run or a model."),
    "runs": ("runs", "runs", "List, show and compare the runs of a folder."),
    "doctor": ("doctor", "doctor", "Check GPU, drivers, libraries and caches, and say how to fix what is wrong."),
}

# What other tools call them.
_ELSEWHERE = {
    **dict.fromkeys(("train", "fit", "tune", "finetune", "fine-tune"), "run"),
    **{loss: f"run --loss {loss}" for loss in ("sft", "dpo", "grpo", "ppo")},
    **dict.fromkeys(("generate", "complete", "infer", "predict"), "sample"),
    **dict.fromkeys(("list", "ls", "history"), "runs list"),
    **dict.fromkeys(("show", "compare"), "runs"),
    **dict.fromkeys(("env", "info", "check"), "doctor"),
    "resume": "run --resume",
    "demo": "quickstart",
    "memory": "plan",
}
PROGRAM = "local-tinker"
INTERRUPTED = 130
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 ok, 1 failed run, 2 usage, 3 environment, 4 out of memory, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except LocalTinkerError as error:
        output.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        output.note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read the output has left; keep the interpreter from complaining when it flushes
        sys.stdout = None
        return 1
    except OSError as error:
        if error.errno not in _DISK:
            raise
        if error.filename is None:  # what was printed went to a file: it must not fail again when it is flushed
            sys.stdout = None
        output.error(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        return 1


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) < 2 or words[0] != "help":
            print(help_text())
            return 0
        words = [words[1], "--help"]
    first, *rest = words
    if first in ("--version", "-V"):
        print(f"{PROGRAM} {version()}")
        return 0
    name = first.replace("_", "-")
    if name not in COMMANDS:
        output.error(_unknown(first))
        return 2
    module, function, summary = COMMANDS[name]
    command = getattr(importlib.import_module(f".{module}", __package__), function)
    if list(inspect.signature(command).parameters) == ["argv"]:
        return command(rest) or 0
    return run_typer(command, rest, name=name, summary=summary)


def run_typer(command: Callable, words: list[str], *, name: str, summary: str) -> int:
    """Parse `words` by the function's typer annotations and call it; an int it returns is the exit code."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda word: word.replace("_", "-")}
    app.command(name, help=inspect.getdoc(command) or summary, context_settings=settings)(command)
    try:
        code = typer.main.get_command(app)(words, prog_name=f"{PROGRAM} {name}", standalone_mode=False)
    except typer.TyperException as error:
        output.error(_usage(error, name, words))
        return error.exit_code
    except typer.Abort:
        output.note("interrupted")
        return INTERRUPTED
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        output.note("interrupted")
    return code if isinstance(code, int) else 0


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"Usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Fine-tune open-weight language models on one machine.",
            "",
            "Commands:",
            *lines,
            "",
            "Options:",
            "  -h, --help     This text; after a command, the command's own.",
            "  -V, --version  The installed version.",
            "",
            "Exit codes: 0 ok, 1 failed run, 2 usage, 3 environment, 4 out of memory, 130 interrupted.",
        ]
    )


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(PROGRAM)
    except PackageNotFoundError:
        return "(not installed: running from a source folder)"


def _unknown(word: str) -> str:
    kind = "option" if word.startswith("-") else "command"
    choices = {name: name for name in ("--help", "--version")}
    if kind == "command":
        choices = {name: name for name in COMMANDS} | _ELSEWHERE
    close = difflib.get_close_matches(word.replace("_", "-").lower(), choices, n=1)
    hint = f"did you mean {choices[close[0]]}?" if close else f"see `{PROGRAM} --help`"
    return f"no {kind} {word!r}; {hint}"


_KINDS = {"integer": "a whole number", "number": "a number"}


def _usage(error: Exception, name: str, words: list[str]) -> str:
    if not hasattr(error, "possibilities"):  # anything but an unknown option
        message = error.format_message().rstrip(".")
        if found := re.match(r"Invalid value for '(--[\w-]+)'.*should be a valid (integer|number)", message):
            flag, kind = found.groups()
            message = f"{flag}: got {_after(flag, words)!r}, {_KINDS[kind]} is needed"
        return f"{message}; see `{PROGRAM} {name} --help`"
    from ..keywords import meant

    word, close = error.option_name, error.possibilities or []
    known = [flag[2:].replace("-", "_") for each in error.ctx.command.params for flag in each.opts]
    ours = meant(word.lstrip("-").replace("-", "_"), known)
    if ours:  # a keyword, such as quantize="4bit", as a flag
        close = ["--" + ours.replace("_", "-").replace("=", " ").replace('"', "")]
    hint = f"did you mean {' or '.join(sorted(close))}?" if close else f"see `{PROGRAM} {name} --help`"
    return f"no option {word}; {hint}"


def _after(flag: str, words: list[str]) -> str:
    """What was written for a flag."""
    pairs = [word.partition("=") for word in words]
    given = [
        value if equals else words[at + 1]
        for at, (word, equals, value) in enumerate(pairs)
        if word.replace("_", "-") == flag
    ]
    return given[-1]

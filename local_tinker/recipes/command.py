"""What `local-tinker run` and `python -m local_tinker.recipes.<name>` do with their words."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import LocalTinkerError, UsageError
from . import RECIPES, find_recipe, sources
from .config import Common, help_lines, nearest, options
from .shipped import beside, shipped

INTERRUPTED = 130
_SUMMARY = "Train, with progress, checkpoints and a record of the run."


@dataclass(frozen=True)
class Job:
    """What to do: a recipe, its config, and how to begin.

    Attributes:
        resume: None to continue the last run of this config if that is unfinished, and otherwise start anew; "" for the newest
            unfinished run of this config; else a run's folder.
        fresh: start anew in any case.
    """

    recipe: ModuleType
    loss: str
    config: Common
    resume: str | None = None
    fresh: bool = False
    dry_run: bool = False


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The words that say what to do, apart from those that say how."""
    actions: dict[str, Any] = {}
    flags, rest = [], list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        name = sources.ACTIONS.get(word.replace("_", "-") if word.startswith("--") else word)
        if name is None:
            flags.append(word + equals + value)
            # a value is never mistaken for an action
            if word.startswith("--") and not equals and rest and not rest[0].startswith("-"):
                flags.append(rest.pop(0))
        elif name in ("dry_run", "fresh", "help"):
            actions[name] = True
        elif equals:
            actions[name] = value
        elif rest and not rest[0].startswith("-"):
            actions[name] = rest.pop(0)
        elif name == "resume":
            actions[name] = ""
        else:
            raise UsageError(
                f"{word} needs a value: {'a file' if name == 'config' else 'one of ' + ', '.join(RECIPES)}"
            )
    return actions, flags


def parse(words: Sequence[str], *, loss: str | None = None, environ: dict[str, str] | None = None) -> Job:
    """The words as a job.

    Args:
        loss: the recipe, when the program itself is one.

    Raises:
        UsageError: unknown names with the nearest known one, values out of range, nothing to train on.
    """
    import os

    environ = dict(os.environ) if environ is None else environ
    actions, flags = split(words)
    if "resume" in actions and actions.get("fresh"):
        raise UsageError("--resume goes on with a run and --fresh starts a new one; give one of them")
    if "resume" in actions:
        training, root = _resume_words(actions, flags, environ)
        if actions["resume"] or not training:
            return _resumed(actions, training, root, loss)
    path = _config_file(actions["config"]) if "config" in actions else None
    values = sources.read_file(path) if path else {}
    in_file = values.pop("loss", None)
    chosen = loss or actions.get("loss") or environ.get(f"{sources.PREFIX}LOSS") or in_file or "sft"
    if loss and actions.get("loss", loss) != loss:
        raise UsageError(
            f"--loss {actions['loss']}: this is the recipe {loss!r}; use `local-tinker run --loss {actions['loss']}`"
        )
    recipe = find_recipe(str(chosen))
    if path and in_file and in_file != chosen:
        raise UsageError(
            f"{path} is for loss {in_file!r} and {chosen!r} was asked for; take recipes/{chosen}.yaml, or leave --loss away"
        )
    known = options(recipe.Config)
    given = sources.collect([(key, value, f"{path}: {key}") for key, value in values.items()], known)
    if path and "dataset" in given:
        for name in {"dataset", "eval_dataset", "reward"} & set(given):
            given[name] = replace(given[name], value=beside(given[name].value, path))
    every = [find_recipe(name).Config for name in RECIPES]
    given |= sources.collect(sources.read_environment(recipe.Config, every, environ), known)
    given |= sources.collect(sources.read_flags(flags, recipe.Config), known, last_wins=True)
    config, to_do = sources.build(recipe.Config, given), {"fresh", "dry_run", "resume"} & set(actions)
    return Job(recipe, str(chosen), config, **{name: actions[name] for name in to_do})


def _resume_words(actions: dict[str, Any], flags: list[str], environ: Mapping[str, str]) -> tuple[list[str], str]:
    """Beside --resume: the words that say what to train, and the folder the runs are in."""
    training = [f"--{name}" for name in ("config", "loss") if name in actions]
    root = environ.get(f"{sources.PREFIX}OUTPUT_DIR", "runs")
    for name, value, where in [] if training else sources.read_flags(flags, Common):
        if sources.canonical(name, options(Common), where) == "output_dir":
            root = value
        else:
            training.append(where)
    return training, root


def _resumed(actions: dict[str, Any], training: list[str], root: str, program: str | None) -> Job:
    """The run named, or the newest unfinished one: its own config, nothing else."""
    from . import resuming

    if training:
        raise UsageError(
            f"--resume {actions['resume']} goes on with that run's own config; leave {training[0]} away, or give --resume "
            "without a name to find the unfinished run of this config"
        )
    run = resuming.to_resume(actions["resume"], root) if actions["resume"] else resuming.newest_unfinished(root)
    saved = dict(run.config)
    loss = saved.pop("loss", "sft")
    if program not in (None, loss):
        raise UsageError(f"run {run.id} is of loss {loss!r} and this is the recipe {program!r}; use `local-tinker run`")
    recipe = find_recipe(loss)
    where = f"{run.path / 'config.yaml'}"
    given = sources.collect(
        [(key, value, f"{where}: {key}") for key, value in saved.items() if value is not None], options(recipe.Config)
    )
    config = sources.build(recipe.Config, given)
    return Job(recipe, loss, config, resume=str(run.path), dry_run=actions.get("dry_run", False))


def _config_file(name: str) -> Path:
    """A path, or the name of a shipped recipe."""
    if Path(name).is_file():
        return Path(name)
    found = shipped(f"{Path(name).stem}.yaml")
    if found is not None and Path(name).name in (found.name, found.stem) and Path(name).parent.name in ("", "recipes"):
        return found
    raise UsageError(
        f"no config file {name!r}{nearest(Path(name).stem, RECIPES)}; shipped recipes: {', '.join(RECIPES)}"
    )


def execute(job: Job) -> None:
    """Run the job; raises what the recipe raises."""
    from ..runs import Run
    from . import resuming

    run = None
    if not job.dry_run and not job.fresh:
        if job.resume:
            run = Run.open(job.resume)
        elif job.resume == "":
            run = resuming.unfinished(job.config, job.loss)
        else:
            run = resuming.continued(job.config, job.loss)
    job.recipe.main(job.config, dry_run=job.dry_run, resume=run)


def usage(program: str, loss: str | None = None) -> str:
    """`--help` of a recipe."""
    recipe = find_recipe(loss or "sft")
    head = [
        f"Usage: {program} [--config FILE] [OPTIONS]",
        "",
        textwrap.fill((recipe.__doc__ or "").split("\n\n")[0], 80) if loss else _SUMMARY,
        "",
        "Precedence: flags, then LOCAL_TINKER_* variables, then the file, then defaults.",
        "",
        "What to do:",
        f"  -c, --config FILE           A file, or a shipped recipe: {', '.join(RECIPES)}.",
        *([] if loss else ["  --loss " + "|".join(RECIPES), f"{'':<30}The objective; with --help: its options. [sft]"]),
        "  --resume [RUN]              Go on with an unfinished run, with its own config;",
        f"{'':<30}without a name: the newest one.",
        "  --fresh                     Start anew, though the last run of this config",
        f"{'':<30}is unfinished and would be continued.",
        "  --dry-run                   Stop before training.",
        "",
    ]
    own = help_lines(recipe.Config, own=True)
    if own:
        head += [f"Options of {loss or 'sft'}:", *own, ""]
    return "\n".join([*head, "Options:", *help_lines(recipe.Config, own=False)])


def start(loss: str, words: Sequence[str] | None = None) -> int:
    """The program `python -m local_tinker.recipes.<loss>`; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    try:
        if split(words)[0].get("help"):
            print(usage(f"python -m local_tinker.recipes.{loss}", loss))
            return 0
        execute(parse(words, loss=loss))
    except LocalTinkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0

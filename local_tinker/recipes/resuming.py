"""Which earlier run a command means: by name, the last one, or the unfinished one of the same config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import report
from .config import Common, resolved

if TYPE_CHECKING:
    from ..runs import Run


def to_resume(word: str, root: str | Path) -> Run:
    """The run to go on with, by any word that means one."""
    from ..lookup import find_run

    run = find_run(word, root)
    if run.status == "finished":
        raise UsageError(
            f"run {run.id} is finished: there is nothing to resume; leave --resume away to start a new run"
        )
    return run


def unfinished(config: Common, loss: str) -> Run:
    """The newest unfinished run of exactly this config."""
    from ..runs import last_unfinished

    found = last_unfinished(config.output_dir, resolved(config, loss))
    if found is None:
        raise UsageError(
            f"no unfinished run of this config in {config.output_dir}; leave --resume away, or name the run"
        )
    return found


def newest_unfinished(root: str | Path) -> Run:
    """The newest unfinished run of a folder, whatever its config."""
    from ..runs import last_unfinished

    found = last_unfinished(root)
    if found is None:
        raise UsageError(
            f"no unfinished run with a checkpoint in {root}; `local-tinker runs list --root {root}` shows what is there, and "
            "--model and --dataset start a new one"
        )
    return found


def continued(config: Common, loss: str) -> Run | None:
    """The last run of exactly this config, if it ended unfinished and has a checkpoint: it is continued unless told otherwise."""
    from ..runs import last_unfinished

    found = last_unfinished(config.output_dir, resolved(config, loss), only_newest=True)
    if found is not None:
        why = f" ({found.cause})" if found.cause else ""
        report.say(f"{found.id} has this config and ended {found.status}{why}: continuing it; --fresh starts a new run")
    else:
        _say_of_others(config, loss)
    return found


def _say_of_others(config: Common, loss: str) -> None:
    """A new run begins beside one of the same config that still runs, or an older one that could go on."""
    from ..runs import runs_of

    others = runs_of(config.output_dir, resolved(config, loss))
    running = next((run for run in others if run.status == "running"), None)
    if running is not None:
        process = running.record["sessions"][-1].get("pid")
        report.say(f"{running.id} has this config and is running (process {process}): this is another run beside it")
    older = next((run for run in others if run.resumable), None)
    if older is not None:
        report.say(
            f"{older.id} of this config is {older.status}: --resume {older.id} goes on with it; this is a new run"
        )

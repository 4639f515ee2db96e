"""Which earlier run a command means: by name, the last one, or the unfinished one of the same config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import report
from .config import Common, nearest, resolved

if TYPE_CHECKING:
    from ..runs import Run


def find_run(word: str, root: str | Path = "runs") -> Run:
    """A run by its folder, its id or the unambiguous start of its id; `last` is the newest."""
    from ..runs import Run, list_runs

    if (Path(word) / "run.json").is_file():
        return Run.open(word)
    found = list_runs(root)
    matches = (
        found[-1:]
        if word == "last"
        else [run for run in found if run.id == word] or [r for r in found if r.id.startswith(word)]
    )
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            f"{word!r} starts {len(matches)} runs: {', '.join(run.id for run in matches)}; type more of it"
        )
    raise UsageError(
        f"no run {word!r} in {root}{nearest(word, [run.id for run in found])}; `local-tinker runs list` shows them"
    )


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
    return found

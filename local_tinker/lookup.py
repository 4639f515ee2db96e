"""Which run a word means, the same for every command: a folder, `last`, an id, a name, or the start of one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import UsageError
from .runs import RECORD, Run, list_runs

_SHOWN = 4


def find_run(word: str, root: str | Path = "runs", *, say: Callable[[str], None] | None = None) -> Run:
    """The run that `word` means.

    Raises:
        UsageError: none, with the nearest; or several, with their ids.
    """
    if (Path(word) / RECORD).is_file():
        return Run.open(word)
    folder, name = _parted(word, root)
    found = list_runs(folder, say=say)
    run = match(name, found)
    if run is None:
        hint = nearest(name, found) or f"`local-tinker runs list --root {folder}` shows the runs"
        where = f"in {folder}" if found else f"in {folder}, which holds no runs"
        raise UsageError(f"no run {name!r} {where}; {hint}")
    return run


def match(word: str, found: Sequence[Run]) -> Run | None:
    """The one of `found` (oldest first) that `word` means; None for none.

    Raises:
        UsageError: several begin with it, or have it for a name.
    """
    matches = [run for run in found if run.id == word]
    if not matches and word == "last":
        matches = list(found[-1:])
    for fits in (lambda run: run.id.startswith(word), lambda run: run.name == word):
        matches = matches or [run for run in found if fits(run)]
    if len(matches) > 1:
        ids = [run.id for run in matches[-_SHOWN:]]
        more = f"the newest {_SHOWN}: " if len(matches) > _SHOWN else ""
        raise UsageError(f"{word!r} means {len(matches)} runs, {more}{', '.join(ids)}; give one of these, or last")
    return matches[0] if matches else None


def nearest(word: str, found: Sequence[Run]) -> str:
    """`did you mean the run x?`, by id or by name, the newest of several; or nothing."""
    spellings = {spelling: run.id for run in found for spelling in (run.id, run.name)}
    close = difflib.get_close_matches(word, spellings, 1, cutoff=0.6)
    return f"did you mean the run {spellings[close[0]]}?" if close else ""


def is_run_path(word: str) -> bool:
    """A path into a folder of runs, such as `runs/2026-01-01-x`, though that run is not there."""
    path = Path(word)
    return not path.exists() and path.name != word and bool(list_runs(path.parent))


def _parted(word: str, root: str | Path) -> tuple[Path, str]:
    path = Path(word)
    return (Path(root), word) if path.name == word else (path.parent, path.name)

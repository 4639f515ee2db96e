"""What `sample` and `chat` are pointed at: a run, an adapter or state folder, or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelError, UsageError
from ..runs import Run, list_runs

_WEIGHTS = "adapter_model.safetensors"


def open_sampler(word: str, *, root: str | Path, quantize: str, seed: int = 42) -> Any:
    """A SamplingClient of what `word` names; loads the base model."""
    if quantize not in ("4bit", "8bit", "none"):
        raise UsageError(f"--quantize must be one of 4bit, 8bit, none, got {quantize!r}")
    target = find_target(word, root)
    from ..service import ServiceClient

    chosen = None if quantize == "none" else quantize
    return ServiceClient().create_sampling_client(target, quantize=chosen, seed=seed)


def find_target(word: str, root: str | Path, *, say: Callable[[str], None] | None = None) -> str:
    """A run (folder, id, start of an id, `last`), an adapter or state folder -> its folder; anything else is a model.

    Raises:
        CheckpointError: a run that has saved nothing. UsageError: the start of several runs' ids.
    """
    path = Path(word).expanduser()
    if (path / _WEIGHTS).is_file():
        return str(path)
    if (path / "run.json").is_file():
        return _weights_of(Run.open(path))
    if not path.exists():
        found = list_runs(root, say=say)
        matches = found[-1:] if word == "last" else [run for run in found if run.id.startswith(word)]
        exact = [run for run in matches if run.id == word] or matches
        if len(exact) == 1:
            return _weights_of(exact[0])
        if exact:
            raise UsageError(
                f"{word!r} starts {len(exact)} runs: {', '.join(run.id for run in exact)}; type more of it"
            )
        _check_model(word, root, [run.id for run in found])
    return word


def _check_model(word: str, root: str | Path, runs: list[str]) -> None:
    """A word that is no run and cannot be a model's name was most likely meant as a run."""
    import difflib

    from ..model import catalogue

    try:
        catalogue.check_name(word)
    except ModelError as error:
        near = difflib.get_close_matches(word, [*runs, *(run.split("-", 3)[-1] for run in runs)], 1, cutoff=0.5)
        meant = next((run for run in runs if near and near[0] in run), None)
        here = f"did you mean the run {meant}?" if meant else f"`local-tinker runs list --root {root}` shows the runs"
        where = f"in {root}" if runs else f"({root} holds no runs)"
        raise UsageError(f"no run {word!r} {where}, and {error}. {here}") from None


def _weights_of(run: Run) -> str:
    if (run.adapter / _WEIGHTS).is_file():
        return str(run.adapter)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"run {run.id} ({run.status}) has saved no adapter and no checkpoint")
    return str(checkpoint.path)

"""What `sample` and `chat` are pointed at: a run, an adapter or state folder, or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import lookup
from ..errors import CheckpointError, ModelError, UsageError
from ..runs import Run, list_runs

_WEIGHTS = "adapter_model.safetensors"


def open_sampler(word: str, settings: dict[str, Any], *, root: str | Path, quantize: str, seed: int = 42) -> Any:
    """A SamplingClient of what `word` names; loads the base model, once `settings` are known to be in range."""
    if quantize not in ("4bit", "8bit", "none"):
        raise UsageError(f"--quantize must be one of 4bit, 8bit, none, got {quantize!r}")
    target = find_target(word, root)
    from ..sampler.sequence import SamplingParams
    from ..service import ServiceClient

    SamplingParams(**settings)

    chosen = None if quantize == "none" else quantize
    return ServiceClient().create_sampling_client(target, quantize=chosen, seed=seed)


def find_target(word: str, root: str | Path, *, say: Callable[[str], None] | None = None) -> str:
    """A run (folder, id, start of an id, name, `last`), an adapter or state folder -> its folder; anything else is a model.

    Raises:
        CheckpointError: a run that has saved nothing. UsageError: a word that means several runs, or nothing.
    """
    path = Path(word).expanduser()
    if (path / _WEIGHTS).is_file():
        return str(path)
    if (path / "run.json").is_file():
        return _weights_of(Run.open(path))
    if path.exists():
        if not (path / "config.json").is_file() and list_runs(path):
            raise UsageError(
                f"{word} is a folder of runs, not one of them; `local-tinker runs list --root {word}` shows them"
            )
        return word
    if lookup.is_run_path(word):
        return _weights_of(lookup.find_run(word, root, say=say))
    found = list_runs(root, say=say)
    run = lookup.match(word, [] if _is_model(word) else found)
    if run is not None:
        return _weights_of(run)
    _check_model(word, root, found)
    return word


def _is_model(word: str) -> bool:
    """An alias of the catalogue: a run of that name is asked for by its id."""
    from ..model import catalogue

    return catalogue.find(word) is not None


def _check_model(word: str, root: str | Path, found: list[Run]) -> None:
    """A word that is no run and cannot be a model's name was most likely meant as a run."""
    from ..model import catalogue

    try:
        catalogue.check_name(word)
    except ModelError as error:
        here = lookup.nearest(word, found) or f"`local-tinker runs list --root {root}` shows the runs"
        where = f"in {root}" if found else f"({root} holds no runs)"
        raise UsageError(f"no run {word!r} {where}, and {error}. {here[0].upper()}{here[1:]}") from None


def _weights_of(run: Run) -> str:
    if (run.adapter / _WEIGHTS).is_file():
        return str(run.adapter)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"run {run.id} ({run.status}) has saved no adapter and no checkpoint")
    return str(checkpoint.path)

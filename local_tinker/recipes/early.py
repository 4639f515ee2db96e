"""What can be known to be wrong before anything is printed or loaded: the model takes minutes, a typing mistake should not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import check_name
from ..data import formats
from ..errors import ModelError, UsageError
from ..hardware import detect, fp8_fault
from ..model import catalogue
from ..runs import RECORD, Run
from ..track import TRACKERS, check_installed
from .config import Common, nearest, run_name
from .scoring import find_reward

if TYPE_CHECKING:
    from .data import Data


def check_config(config: Common) -> None:
    """The settings alone, before the rows are read.

    Raises:
        UsageError, ModelError, MissingDependencyError: the first thing that would end the run later.
    """
    check_name(run_name(config, "run"))
    check_installed(tracker_names(config))
    check_folder(config.output_dir)
    _check_model(config.model)
    if config.compute == "fp8" and (reason := fp8_fault(detect().capability)) is not None:
        raise UsageError(f"compute=fp8 does not run here: {reason}; leave it out")
    if hasattr(config, "max_tokens"):
        _check_room(config)


def check_rows(config: Common, data: Data, loss: str) -> None:
    """The shape and the fields of every row, and the columns of a reward function.

    Raises:
        DatasetError: a row that cannot be read for this loss, with file and line. UsageError: a column that the reward needs.
    """
    for rows in (data.rows, data.held_out) if not config.max_bad else ():
        first = None
        for row in rows:
            shape = formats.recognise(row, loss)
            first = first or shape
            if shape != first and loss not in formats.POLICY_LOSSES:
                raise formats.mixed(row, first, shape)
            formats.to_example(row, loss, shape=shape)
    if hasattr(config, "reward"):
        from .data import columns_of

        find_reward(config.reward).check_columns(columns_of(data.rows))


def tracker_names(config: Common) -> list[str]:
    """The trackers asked for, known ones only."""
    names = [name.strip() for name in config.report_to.split(",") if name.strip()]
    for name in names:
        if name != "none" and name not in TRACKERS:
            raise UsageError(
                f"report_to: no tracker {name!r}{nearest(name, TRACKERS)}; there are none, {', '.join(TRACKERS)}"
            )
    return names


def check_folder(name: str) -> None:
    """Raise UsageError when no run can be written below this folder, there already or not."""
    exists = Path(name).expanduser().absolute()
    while not os.path.lexists(exists):
        exists = exists.parent
    if not exists.is_dir():
        raise UsageError(f"output_dir {name!r} cannot hold runs: {exists} is not a folder; name another output_dir")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {name!r} cannot hold runs: {exists} cannot be written; name another output_dir")


def _check_model(name: str) -> None:
    path = Path(name)
    if (path / RECORD).is_file():
        base = Run.open(path).config.get("model", "its base model")
        raise UsageError(
            f"model {name!r} is a run, which holds an adapter: name its base model, {base}; from Python, "
            f'create_lora_training_client({base!r}, adapter="{path / "adapter"}") trains on from it'
        )
    catalogue.check_name(name)


def _check_room(config: Common) -> None:
    """An answer of max_tokens, and a prompt before it."""
    longest = config.max_length
    if longest is None:
        try:
            longest = catalogue.dims(config.model).max_positions
        except ModelError:  # its dimensions are known when it is here
            return
    if config.max_tokens >= longest:
        name = "max_length" if config.max_length else f"the context of {config.model}"
        raise UsageError(
            f"max_tokens={config.max_tokens:,} leaves no room for a prompt in {name}, {longest:,} tokens; lower it"
        )

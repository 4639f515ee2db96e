"""What can be known to be wrong before anything is printed or loaded: the model takes minutes, a typing mistake should not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import formats
from ..errors import ModelError, UsageError
from ..model import catalogue
from ..track import TRACKERS, check_installed
from .config import Common, nearest
from .scoring import find_reward

if TYPE_CHECKING:
    from .data import Data


def check_config(config: Common) -> None:
    """The settings alone, before the rows are read.

    Raises:
        UsageError, ModelError, MissingDependencyError: the first thing that would end the run later.
    """
    check_installed(tracker_names(config))
    check_folder(config.output_dir)
    catalogue.check_name(config.model)
    if hasattr(config, "max_tokens"):
        _check_room(config)


def check_rows(config: Common, data: Data, loss: str) -> None:
    """The shape of every row, and the columns of a reward function.

    Raises:
        DatasetError: no shape for this loss, with file and line. UsageError: a column that the reward needs.
    """
    if not config.max_bad:
        for rows in (data.rows, data.held_out):
            for row in rows:
                formats.recognise(row, loss)
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

"""Data sets of the Hugging Face hub, through `datasets`, which is imported only when one is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DatasetError, LocalTinkerError, MissingDependencyError, UsageError

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")
_PATIENCE = 15  # seconds


def table(where: str, split: str, *, near: str = "") -> Iterable[Any]:
    """The rows of one split.

    Args:
        where: `org/name` or `org/name:config`.
        near: a file here that may have been meant.

    Raises:
        DatasetError: nobody answers, or there is no such data set, configuration or split. MissingDependencyError: `datasets`.
    """
    hub_id, _, config = where.partition(":")
    if not HUB_ID.match(where):
        raise UsageError(f"{where!r} is not a hub id; they look like org/name or org/name:config")
    hint = f" (did you mean {near}?)" if near else ""
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{hub_id!r} is no file here{hint}, and reading it from the hub needs datasets: pip install datasets"
        ) from None
    try:
        _ask(hub_id, Path(datasets.config.HF_DATASETS_CACHE))
        return datasets.load_dataset(hub_id, config or None, split=split)
    except LocalTinkerError:
        raise
    # The hub client raises many unrelated types (offline, gated, unknown split or configuration).
    except Exception as error:
        if type(error).__name__ == "RepositoryNotFoundError":
            raise DatasetError(
                f"no such file or folder here{hint}, and no such data set on the hub, or none that you may read "
                "(`hf auth login`)",
                path=hub_id,
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(
            f"no such file or folder here{hint}, and the hub id could not be loaded: {reason}", path=hub_id
        ) from error


def _ask(hub_id: str, cache: Path) -> None:
    """One short question, so that a hub out of reach is known at once: `datasets` would ask again for half a minute.

    With the data set in the cache, or the hub switched off, `datasets` finds its way alone.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (cache / hub_id.replace("/", "___")).is_dir():
        return
    try:
        HfApi().dataset_info(hub_id, timeout=_PATIENCE)
    except OfflineModeIsEnabled:
        return

"""Rows -> batches in a seeded order that can be resumed in the middle of an epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ..checks import whole
from ..errors import DatasetError, StateError, UsageError
from ..keywords import known_keywords
from .rows import Rows, digest

_SETTINGS = ("batch_size", "seed", "shuffle", "drop_last", "rows", "digest")


class Batches:
    """Lists of rows, epoch after epoch. Iterating again goes on where the last loop stopped, and after the end anew.

    Attributes:
        epoch: 0-based epoch of the next batch; equal to `epochs` at the end.
        position: batches of that epoch already handed out.
    """

    def __init__(
        self, rows: Sequence[Any], *, batch_size: int, epochs: int, seed: int, shuffle: bool, drop_last: bool
    ) -> None:
        self._rows = rows
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = self.position = 0
        self._digest: str | None = None
        self._resumed = False

    @property
    def per_epoch(self) -> int:
        whole, rest = divmod(len(self._rows), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __len__(self) -> int:
        """Batches of all epochs together, those already handed out included."""
        return self.per_epoch * self.epochs

    def __iter__(self) -> Iterator[list[Any]]:
        if self.epoch >= self.epochs and not self._resumed:
            self.epoch = self.position = 0
        self._resumed = False
        while self.epoch < self.epochs:
            order = self.order(self.epoch)
            while self.position < self.per_epoch:
                start = self.position * self.batch_size
                batch = [self._rows[index] for index in order[start : start + self.batch_size]]
                # Counted before it is handed out: a state taken in the loop's body is after this batch.
                self.position += 1
                if self.position == self.per_epoch:
                    self.epoch, self.position = self.epoch + 1, 0
                    yield batch
                    break
                yield batch

    def order(self, epoch: int) -> list[int]:
        """Row indices of an epoch: a function of (seed, epoch) alone, apart from every other random state."""
        order = list(range(len(self._rows)))
        if self.shuffle:
            random.Random(f"local-tinker batches {self.seed} {epoch}").shuffle(order)
        return order

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = self._rows.digest if isinstance(self._rows, Rows) else digest(self._rows)
        return self._digest

    def _settings(self) -> dict[str, Any]:
        values = (self.batch_size, self.seed, self.shuffle, self.drop_last, len(self._rows), self.digest)
        return dict(zip(_SETTINGS, values, strict=True))

    def state(self) -> dict[str, Any]:
        """Plain JSON: where the next batch is, and what that rests on."""
        return {"epoch": self.epoch, "position": self.position, **self._settings()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The number of epochs may differ; rows and settings may not.

        Raises:
            StateError: with what was and what is.
        """
        missing = [key for key in ("epoch", "position", *_SETTINGS) if key not in state]
        if missing:
            raise StateError(f"not a state of batches(): it lacks {', '.join(missing)}")
        now = self._settings()
        changed = [f"{key}: {_short(state[key])} then, {_short(now[key])} now" for key in now if state[key] != now[key]]
        if changed:
            raise StateError(
                f"the state belongs to other batches ({'; '.join(changed)}); use the same rows and settings"
            )
        if not (0 <= state["epoch"] and 0 <= state["position"] < max(self.per_epoch, 1)):
            raise StateError(f"no such place: epoch {state['epoch']}, batch {state['position']} of {self.per_epoch}")
        self.epoch, self.position, self._resumed = state["epoch"], state["position"], True


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)


@known_keywords
def batches(
    rows: Sequence[Any],
    *,
    batch_size: int,
    epochs: int = 1,
    seed: int = 42,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Batches:
    """Lists of `batch_size` rows (the last of an epoch may be shorter), in a new seeded order each epoch.

    Args:
        rows: anything with a length and indices: `Rows`, a list, a Dataset.
        drop_last: leave out the last batch of an epoch when it is short.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
        whole(name, value, least=least)
    if isinstance(rows, str | bytes | dict) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UsageError(
            f"batches needs rows with a length and indices, got {type(rows).__name__}; give load_rows(...), a list, or "
            "list(stream)"
        )
    if len(rows) == 0:
        raise DatasetError("no examples: the rows are empty")
    out = Batches(rows, batch_size=batch_size, epochs=epochs, seed=seed, shuffle=shuffle, drop_last=drop_last)
    if out.per_epoch == 0:
        raise UsageError(f"drop_last leaves no batch: {len(rows)} rows, batch_size {batch_size}")
    return out

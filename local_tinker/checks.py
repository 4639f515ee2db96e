"""Checks of one value each: whole numbers, shares, token ids. Booleans are no numbers here, and text is no list."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UsageError


def whole(name: str, value: Any, *, least: int = 1, most: int | None = None, why: str = "") -> int:
    """A whole number in a range; `why` tells where its upper end comes from."""
    right = isinstance(value, int) and not isinstance(value, bool)
    if not right or value < least or (most is not None and value > most):
        upto = "" if most is None else f" and <= {most}{why}"
        raise UsageError(f"{name} must be a whole number >= {least}{upto}, got {value!r}")
    return value


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UsageError(f"{name} must be a number > 0, got {value!r}")
    return float(value)


def share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UsageError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def integer(name: str, value: Any) -> int:
    """A whole number of any kind, numpy's too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r} ({type(value).__name__})") from None


def token_id(value: Any) -> int:
    return value if type(value) is int else integer("a token id", value)  # nearly always one, and there are many


def items(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a list, got {value!r} ({type(value).__name__})")
    return tuple(value)


def flag(value: Any) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, str) or value not in (0, 1):
        raise UsageError(f"trained must hold True or False a token, got {value!r} ({type(value).__name__})")
    return bool(value)


def logprob(value: Any) -> float:
    if not is_number(value):
        raise UsageError(f"logprobs must hold a number a token, got {value!r} ({type(value).__name__})")
    return float(value)


def is_number(value: Any) -> bool:
    return type(value) is float or isinstance(value, numbers.Real) and not isinstance(value, bool)


def at_least_0(name: str, value: Any) -> None:
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} must be a finite number >= 0, got {value!r}")

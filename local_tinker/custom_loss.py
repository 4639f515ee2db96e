"""A loss written by the user, as weights of a linear one.

A function C of the log-probs has the gradient of sum_i w_i log p_i with w_i = dC/dlog p_i, so the engine only ever runs
that linear loss, over the same micro-batches; the user's function runs here, in the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .errors import UsageError
from .types import Datum


def evaluate(fn: Callable[..., Any], data: list[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """Call `fn(data, logprobs)` and check what it returns: (scalar tensor that depends on the log-probs, metrics)."""
    import torch

    answer = fn(data, logprobs)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise UsageError(f"the custom loss must return (loss, metrics), got {type(answer).__name__}")
    loss, metrics = answer
    if not torch.is_tensor(loss) or loss.numel() != 1:
        raise UsageError(f"the custom loss must be a scalar tensor, got {type(loss).__name__}")
    if not loss.requires_grad:
        raise UsageError(
            "the custom loss does not depend on the log-probs it was given; compute it from them, without detach()"
        )
    return loss, {name: float(value) for name, value in (metrics or {}).items()}


def loss_weights(loss: Any, logprobs: Sequence[Any]) -> list[np.ndarray]:
    """dC/dlog p, one array a datum; 0 where C does not read the log-prob.

    Raises:
        UsageError: a value that is not finite, naming datum and position.
    """
    import torch

    gradients = torch.autograd.grad(loss, logprobs, allow_unused=True)
    weights = [
        np.zeros(lp.shape, np.float32) if g is None else g.numpy() for g, lp in zip(gradients, logprobs, strict=True)
    ]
    for i, w in enumerate(weights):
        if not np.isfinite(w).all():
            raise UsageError(
                f"the custom loss has a gradient that is not finite for datum {i}, position {int(np.argmin(np.isfinite(w)))}"
            )
    return weights


def with_weights(datum: Datum, weights: np.ndarray | None) -> Datum:
    """The datum's tokens and targets with these weights alone; every position where None."""
    inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"]}
    return Datum(datum.model_input, inputs if weights is None else {**inputs, "weights": weights}, datum.source)

"""Encoded examples, rollouts and Hugging Face tensors -> Datums. The only place where targets are shifted.

N input tokens of a datum, K targets a position. Position i of the input predicts ``target_tokens[i]``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DatasetError, UsageError
from ..types import Completion, Datum, ModelInput, Rollout
from .render import Encoded

IGNORED = -100  # Hugging Face's label of a position that is not trained


def supervised(encoded: Encoded, source: Any = None) -> Datum:
    """All tokens but the last as input, all but the first as targets, weight 1.0 where the target is trained."""
    trained = np.asarray(encoded.trained[1:], dtype=np.float32)
    if not trained.any():
        raise DatasetError("0 trained tokens: nothing of this example would be learned", path=_place(source))
    inputs = {"target_tokens": np.asarray(encoded.tokens[1:], dtype=np.int64), "weights": trained}
    return Datum(ModelInput.from_ints(encoded.tokens[:-1]), inputs, _place(source))


def preference(chosen: Encoded, rejected: Encoded, source: Any = None) -> tuple[Datum, Datum]:
    """The pair (chosen, rejected); both continue the same prompt ids."""
    prompts = [side.tokens[: side.prompt_length] for side in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        raise DatasetError(
            f"the prompts of chosen and rejected differ as tokens ({len(prompts[0])} and {len(prompts[1])} tokens)",
            path=_place(source),
        )
    return supervised(chosen, source), supervised(rejected, source)


def rollout(sample: Completion | Rollout, advantages: float | Sequence[float] | None = None) -> Datum:
    """What a policy sampled: weight 1.0 and the sampling log-prob on each sampled token, 0.0 elsewhere.

    Args:
        advantages: one number for all sampled tokens, or one for every token after the prompt.
    """
    name = f"rollout {sample.id}"
    prompt, tokens = list(sample.prompt_tokens), list(sample.tokens)
    if not prompt:
        raise DatasetError("no prompt tokens: the first sampled token would have nothing before it", path=name)
    if not any(sample.trained):
        raise DatasetError("0 trained tokens: no token of this rollout was sampled by the policy", path=name)
    before = np.zeros(len(prompt) - 1)
    trained = np.asarray(sample.trained, dtype=np.float64)

    def aligned(values: Any) -> np.ndarray:
        return np.concatenate([before, np.asarray(values, dtype=np.float64) * trained]).astype(np.float32)

    whole = [*prompt, *tokens]
    inputs = {
        "target_tokens": np.asarray(whole[1:], dtype=np.int64),
        "weights": aligned(np.ones(len(tokens))),
        "logprobs": aligned(sample.logprobs),
    }
    if advantages is not None:
        values = np.asarray(advantages, dtype=np.float64)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != len(tokens)):
            raise UsageError(
                f"{name}: advantages of shape {values.shape} for {len(tokens)} tokens; give a number or {len(tokens)}"
            )
        inputs["advantages"] = aligned(np.broadcast_to(values, (len(tokens),)))
    return Datum(ModelInput.from_ints(whole[:-1]), inputs, name)


def tensor_encoded(batch: Mapping[str, Any]) -> list[Encoded]:
    """A Hugging Face batch (labels unshifted, -100 where not trained) without its padding.

    Padding is what `attention_mask` says, never a token id: where pad and EOS are one token, EOS stays trained.
    """
    if batch.get("labels") is None:
        raise DatasetError(
            "input_ids without labels: give labels too (unshifted, -100 where not trained)", field="labels"
        )
    ids, labels = (_rows_of(batch[key], key) for key in ("input_ids", "labels"))
    mask = batch.get("attention_mask")
    masks = _rows_of(mask, "attention_mask") if mask is not None else [[1] * len(row) for row in ids]
    if not len(ids) == len(labels) == len(masks):
        raise DatasetError(f"input_ids, labels and attention_mask have {len(ids)}, {len(labels)}, {len(masks)} rows")
    for key in ("position_ids", "cu_seq_lens_q", "seq_idx"):
        if batch.get(key) is not None and any(row.count(0) > 1 for row in _rows_of(batch[key], key)):
            raise DatasetError(f"the rows are already packed ({key} starts again); give one example a row", field=key)
    return [_tensor_row(index, *row) for index, row in enumerate(zip(ids, labels, masks, strict=True))]


def tensor_rows(batch: Mapping[str, Any]) -> list[Datum]:
    """A Hugging Face batch of input_ids, attention_mask and labels -> one Datum a row."""
    return [supervised(row, f"row {index} of the tensors") for index, row in enumerate(tensor_encoded(batch))]


def _rows_of(value: Any, key: str) -> list[list[int]]:
    rows = value.tolist() if hasattr(value, "tolist") else value
    rows = [row.tolist() if hasattr(row, "tolist") else list(row) if isinstance(row, Sequence) else row for row in rows]
    if rows and not isinstance(rows[0], list):
        rows = [rows]
    for index, row in enumerate(rows):
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in row):
            raise DatasetError(f"row {index} holds values that are not whole numbers", field=key)
    return rows


def _tensor_row(index: int, ids: list[int], labels: list[int], mask: list[int]) -> Encoded:
    if not len(ids) == len(labels) == len(mask):
        raise DatasetError(
            f"row {index}: {len(ids)} input_ids, {len(labels)} labels, {len(mask)} attention_mask values"
        )
    kept = [i for i, on in enumerate(mask) if on]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise DatasetError(f"row {index}: attention_mask has holes inside the text", field="attention_mask")
    for i in kept:
        if labels[i] not in (IGNORED, ids[i]):
            raise DatasetError(
                f"row {index}, position {i}: label {labels[i]} for token {ids[i]}. Labels must be the input_ids "
                "themselves (not shifted), or -100",
                field="labels",
            )
    trained = [labels[i] != IGNORED for i in kept]
    trained[:1] = [False] * len(trained[:1])
    if not any(trained):
        raise DatasetError(f"row {index}: 0 trained tokens, every label is -100", field="labels")
    # What follows the last trained token predicts nothing.
    end = len(trained) - trained[::-1].index(True)
    return Encoded([ids[i] for i in kept[:end]], trained[:end])


def validate_datums(datums: Iterable[Datum], vocab_size: int, *, negative_weights: bool = False) -> None:
    """Refuse, before any GPU work, what a loss could not read; every message names the datum and the position.

    Args:
        vocab_size: ids must lie in [0, vocab_size).
        negative_weights: allowed for custom losses only.
    """
    for index, datum in enumerate(datums):
        name = f"datum {index}" + (f" ({datum.source})" if datum.source else "")
        tokens = _as_ids(datum.model_input.to_ints())
        if len(tokens) == 0:
            raise DatasetError("model_input is empty", path=name)
        _check_ids(name, "model_input", tokens, vocab_size)
        for key, values in datum.loss_fn_inputs.items():
            _check_aligned(name, key, values, len(tokens))
            _check_columns(name, key, values, datum.loss_fn_inputs.get("target_tokens"))
            if key == "target_tokens":
                _check_ids(name, key, values, vocab_size)
            elif not np.isfinite(values).all():
                place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise DatasetError(f"{values[place]} at position {place[0]}; give finite numbers", path=name, field=key)
        weights = datum.loss_fn_inputs.get("weights")
        if weights is not None and not weights.any():
            raise DatasetError("0 trained tokens: every weight is 0; leave this datum out", path=name, field="weights")
        if weights is not None and not negative_weights and (weights < 0).any():
            place = int(np.argwhere(weights < 0)[0][0])
            raise DatasetError(
                f"negative weight at position {place}; only custom losses take those", path=name, field="weights"
            )


KNOWN_FIELDS = ("target_tokens", "weights", "logprobs", "advantages")


def check_fields(datums: Sequence[Datum], spec: Any = None) -> None:
    """Every datum has what the loss needs and nothing that no loss reads.

    Args:
        spec: the loss (`losses.base.LossSpec`); None asks for targets only.
    """
    needed = ("target_tokens",) if spec is None else tuple(f for f in spec.required_fields if f != "weights")
    label = "a custom loss" if spec is None else repr(spec.name)
    for index, datum in enumerate(datums):
        inputs = datum.loss_fn_inputs
        for name in inputs:
            if name not in KNOWN_FIELDS:
                near = difflib.get_close_matches(name, KNOWN_FIELDS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(
                    f"datum {index} has a field {name!r}, which no loss reads{hint} (known: {', '.join(KNOWN_FIELDS)})"
                )
        lacking = [name for name in needed if name not in inputs]
        if lacking:
            raise UsageError(
                f"datum {index} has no {lacking[0]!r}, which {label} needs; its loss_fn_inputs are "
                f"{', '.join(sorted(inputs)) or 'empty'}"
            )
        odd = set(inputs) ^ set(datums[0].loss_fn_inputs) - {"weights"}
        odd -= {"weights"}
        if odd:
            raise UsageError(
                f"datum {index} and datum 0 differ in the field {min(odd)!r}; give it in all datums of a batch or in none"
            )


def _as_ids(ids: list[int]) -> np.ndarray:
    try:
        return np.asarray(ids, dtype=np.int64)
    except OverflowError:
        # Ids of 64 bits and more, to be refused by value.
        return np.asarray(ids, dtype=object)


def _check_aligned(name: str, key: str, values: np.ndarray, length: int) -> None:
    if values.ndim == 0 or len(values) != length:
        hint = ""
        if key == "target_tokens" and values.ndim and len(values) == length + 1:
            hint = ": give model_input=tokens[:-1] and target_tokens=tokens[1:]"
        raise DatasetError(f"shape {values.shape} for {length} input tokens{hint}", path=name, field=key)


def _check_columns(name: str, key: str, values: np.ndarray, targets: np.ndarray | None) -> None:
    """Fields have the shape of the targets; weights may also be one a position."""
    if key == "target_tokens" or targets is None or values.shape == targets.shape:
        return
    if key == "weights" and values.ndim == 1:
        return
    raise DatasetError(f"shape {values.shape} beside target_tokens of shape {targets.shape}", path=name, field=key)


def _check_ids(name: str, key: str, ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        place = tuple(int(i) for i in np.argwhere((ids < 0) | (ids >= vocab_size))[0])
        raise DatasetError(
            f"token id {int(ids[place])} at position {place[0]}; the vocabulary has ids 0 to {vocab_size - 1}",
            path=name, field=key,
        )  # fmt: skip


def _place(source: Any) -> str | None:
    return None if source is None else str(source)

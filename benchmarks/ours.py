"""Our side of the training benchmark, through the public API alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import work
from .meter import Meter, cap_memory
from .work import Case, Document

GROUP = 8  # completions a prompt in grpo
GRAIN = 4096  # tokens between two tries of the longest context
LEARNING_RATE = 1e-4


def run(case: Case, folder: Path, device: str, peak_flops: float, *, profile: Path | None, say: Callable) -> dict:
    """Load, warm up, time `case.steps` optimiser steps; or search for the longest context.

    Args:
        profile: append a profile of one more step to this file.
        say: reports a partial result, so that a search cut by its time-out keeps what it found.
    """
    import torch

    from local_tinker import ServiceClient

    if case.gib:
        cap_memory(case.gib)
    start = time.perf_counter()
    trainer = ServiceClient(device=device).create_lora_training_client(
        str(folder),
        rank=case.rank,
        quantize="4bit" if case.q4 else None,
        micro_batch_tokens=case.micro or None,
        compute=case.compute or None,
    )
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - start, 2)}
    if device == "cuda":
        torch.cuda.synchronize()
        found["weights_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    if case.search:
        return found | longest(case, trainer, say)
    total = case.warmup + case.steps
    windows = work.windows(case, work.documents(case))[: total + 1]
    assert len(windows) == total + 1, "too few documents for the steps asked for"
    steps = [batches(case, window) for window in windows]
    meter = Meter(device)
    for i in range(total):
        if i == case.warmup:
            meter.start()
        loss = step(case, trainer, steps[i])
        for micro in windows[i]:
            meter.add(np.asarray([len(doc.tokens) for doc in micro]), sum(doc.loss_tokens for doc in micro))
        meter.steps += 1
    meter.stop()
    found |= meter.result(case, peak_flops)
    if profile is not None:
        from . import trace

        found["parts_ms"] = trace.profile(
            lambda: step(case, trainer, steps[total]),
            case=case,
            device=device,
            path=profile,
            step_ms=found["ms_a_step"],
        )
    value = float(loss)
    assert math.isfinite(value), f"the loss is {value}"
    return found | {"loss_value": round(value, 4)}


def step(case: Case, trainer, calls: list[tuple]) -> Any:
    """One optimiser step; nothing is read, so nothing waits for the device."""
    from torch.profiler import record_function

    for arguments in calls:
        with record_function("forward_backward"):
            loss = trainer.forward_backward(*arguments, loss_fn=case.loss)
    with record_function("optim_step"):
        trainer.optim_step(learning_rate=LEARNING_RATE)
    return loss


def batches(case: Case, window: list[list[Document]]) -> list[tuple]:
    """What each forward_backward of a step is given: the whole window once, or with `split` one call a micro-batch."""
    parts = window if case.split else [[doc for micro in window for doc in micro]]
    if case.loss == "grpo":
        return [rollouts(case, part) for part in parts]
    return [([datum(case, doc) for doc in part],) for part in parts]


def datum(case: Case, doc: Document):
    from local_tinker import Datum, ModelInput

    weights = np.ones(len(doc.tokens) - 1, np.float32)
    weights[: max(doc.start - 1, 0)] = 0.0
    inputs = {"target_tokens": doc.tokens[1:]}
    if case.loss == "importance_sampling":
        # Tinker's policy losses have no weights: a token that is not trained has advantage 0
        inputs |= {"logprobs": _old_logprobs(case, len(weights)), "advantages": weights}
    else:
        inputs["weights"] = weights
    return Datum(ModelInput.from_ints(doc.tokens[:-1].tolist()), inputs)


def rollouts(case: Case, docs: list[Document]) -> tuple[list[list], list[list[float]]]:
    """Documents as groups of completions with rewards; a document's first token is its prompt at least."""
    from local_tinker import Rollout

    made = []
    for doc in docs:
        start = max(doc.start, 1)
        tokens = doc.tokens[start:].tolist()
        made.append(
            Rollout(
                prompt_tokens=doc.tokens[:start].tolist(),
                tokens=tokens,
                trained=[True] * len(tokens),
                logprobs=_old_logprobs(case, len(tokens)).tolist(),
                stop_reason="length",
                weights_version="benchmark",
            )
        )
    # a group needs two at least, so a last one that would be alone joins the one before
    edges = [*range(0, max(len(made) - 1, 1), GROUP), len(made)]
    groups = [made[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return groups, [[float(i % 2) for i in range(len(group))] for group in groups]


def _old_logprobs(case: Case, count: int) -> np.ndarray:
    """Those of a flat policy: random weights are near one, so importance ratios are near 1."""
    return np.full(count, -math.log(work.MODELS[case.model]["config"]["vocab_size"]), np.float32)


def longest(case: Case, trainer, say: Callable[[dict], None]) -> dict:
    """The longest single document, in whole grains of tokens, that trains one step; every try is reported as it ends."""
    import torch

    tried: dict[int, str] = {}
    found = {"context": 0, "tried": tried}

    def trains(tokens: int) -> bool:
        doc = Document(np.random.default_rng(tokens).integers(10, 500, tokens), 0)
        start = time.perf_counter()
        try:
            loss = float(step(case, trainer, [([datum(case, doc)],)]))
            tried[tokens] = f"loss {loss:.3f}, {time.perf_counter() - start:.1f} s"
            found["context"] = max(found["context"], tokens)
            return True
        except Exception as error:
            # whatever stops it is the answer of the search, and is shown beside the result
            tried[tokens] = f"{type(error).__name__}: {str(error)[:200]}"
            return False
        finally:
            torch.cuda.empty_cache()
            say(found)

    search(trains, case.search)
    return found


def search(trains: Callable[[int], bool], start: int) -> int:
    """The largest multiple of `GRAIN` that trains, 0 for none: up or down in steps of 4 grains, then halving."""
    good, bad = 0, None
    at = max(GRAIN, start // GRAIN * GRAIN)
    while bad is None or bad - good > GRAIN:
        if trains(at):
            good = at
        else:
            bad = at
        if bad is None:
            at = good + 4 * GRAIN
        elif good == 0:
            at = max(bad - 4 * GRAIN, bad // 2 // GRAIN * GRAIN)
        else:
            at = (good + bad) // 2 // GRAIN * GRAIN
    return good

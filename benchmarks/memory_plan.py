"""The memory plan against the card: predicted and measured peak of a step, for models, lengths and amounts of memory.

python -m benchmarks.memory_plan                  # 1B, 3B and 8B of Llama's sizes with random weights, NF4, rank 32
python -m benchmarks.memory_plan --sizes llama3b  # some of them
python -m benchmarks.memory_plan --plain          # on the plain road, which models of other families take
python -m benchmarks.memory_plan --tiny           # the bookkeeping on a CPU, nothing measured, nothing written

"free" gives the plan 72 GiB. "middle" and "tight" give it what a step of the length needs at the least, and three tenths
or a twentieth of the way from there to what it needs when nothing is recomputed.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from . import report
from .gpu_loop import random_model

SIZES = ("llama1b", "llama3b", "llama8b")
LENGTHS = (2048, 16384)
SHARES = {"tight": 0.05, "middle": 0.3}
RANK = 32
FREE = 72 * 2**30
CAP = 0.98  # of the card, so that a plan that is wrong fails here and not in the driver


def limits(dims, settings, length: int) -> dict[str, int]:
    """Bytes for a whole step, weights included, by name."""
    from local_tinker.engine.footprint import Choice, total_bytes
    from local_tinker.engine.memory import MOST_TOKENS, least_bytes

    tokens = max(MOST_TOKENS[settings.kind], length)
    roomy = Choice(tokens=tokens, levels=("norms",) * dims.layers)
    least = least_bytes(dims, replace(settings, seq_len=length), min(2048, length))
    span = total_bytes(dims, settings, roomy) - least
    return {name: least + int(share * span) for name, share in SHARES.items()} | {"free": FREE}


def documents(tokens: int, length: int, vocab: int):
    """Units of one random document, every token trained, that fill a micro-batch: of `length`, and a shorter last one."""
    import numpy as np

    from local_tinker import Datum, ModelInput

    rng = np.random.default_rng(0)
    lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    rows = [rng.integers(0, vocab, n + 1).tolist() for n in lengths]
    return [(Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}),) for row in rows]


def measure(model, spec, name: str, limit: int, length: int, *, before: int, cuda: bool) -> dict:
    """One step by the plan for `limit` bytes; its peak above what was allocated before the model came."""
    import torch

    from local_tinker.engine.base import LossCall
    from local_tinker.engine.footprint import total_bytes
    from local_tinker.engine.planning import plan_budget
    from local_tinker.engine.trainer import Trainer
    from local_tinker.types import AdamParams

    budget = plan_budget(model, spec, micro_batch_tokens=None).within(limit)
    said: list[str] = []
    trainer = Trainer(model, spec, budget, say=said.append)
    trainer.make_room()
    choice = budget.choice_for(length)
    tokens = choice.tokens if cuda else length
    units = documents(tokens, length, model.vocab_size)
    call, seconds = LossCall(units, "sft"), []
    for _ in range(2 if cuda else 1):  # kernels are compiled in the first
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        float(trainer.forward_backward(call))
        trainer.optim_step(AdamParams(learning_rate=1e-4), value_learning_rate=1e-3)
        seconds.append(time.perf_counter() - start)
    measured = torch.cuda.max_memory_allocated() - before if cuda else None
    reserved = torch.cuda.max_memory_reserved() if cuda else None
    predicted = total_bytes(budget.dims, budget.settings, choice)
    return {
        "memory": name,
        "length": length,
        "limit": limit,
        "tokens": choice.tokens,
        "levels": dict(Counter(choice.levels)),
        "resident": choice.resident_layers,
        "head_rows": choice.head_rows,
        "tile": choice.tile,
        "parked": choice.parked_moments,
        "predicted": predicted,
        "measured": measured,
        "reserved": reserved,
        "error": None if measured is None else predicted / measured - 1,
        "tokens_per_s": round(tokens / seconds[-1]),
        "stepped_down": len(said),
    }


def run(size: str, *, cuda: bool, vocab: int, lengths: tuple[int, ...], plain: bool = False) -> list[dict]:
    """All lengths and amounts of memory for one model."""
    import torch

    from local_tinker.engine.planning import plan_budget
    from local_tinker.model.adapter import AdapterSpec
    from local_tinker.model.load import load_model

    gc.collect()  # the model before this one
    before = torch.cuda.memory_allocated() if cuda else 0
    with tempfile.TemporaryDirectory() as folder:
        path = random_model(size, Path(folder), vocab=vocab)
        gc.collect()
        model = load_model(path, quantize="4bit", dtype="bfloat16", device="cuda" if cuda else "cpu", plain_road=plain)
    assert plain or model.fast is not None, model.said
    shapes = tuple((p, (linear.out_features, linear.in_features)) for p, linear in model.projections.items())
    spec = AdapterSpec(rank=RANK, alpha=RANK, shapes=shapes)
    found = []
    for length in lengths:
        settings = plan_budget(model, spec, micro_batch_tokens=None).settings
        for name, limit in limits(model.dims, settings, length).items():
            road = {"model": size} | ({"road": "plain"} if plain else {})
            found.append(road | measure(model, spec, name, limit, length, before=before, cuda=cuda))
            print(line(found[-1]), flush=True)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    return found


def line(row: dict) -> str:
    levels = " ".join(f"{count}x{level}" for level, count in row["levels"].items())
    sizes = [row["limit"], row["predicted"], row["measured"]]
    shown = ["   -  " if size is None else f"{size / 2**30:6.2f}" for size in sizes]
    error = "     -" if row["error"] is None else f"{row['error']:+6.1%}"
    return (
        f"{row['model']:8} {row['length']:6} {row['memory']:6} {' '.join(shown)} {error} {row['tokens_per_s']:7,} tok/s  "
        f"{row['tokens']} tokens, {levels}, {row['resident']} resident, head {row['head_rows']}"
        f"{', parked' if row['parked'] else ''}{', STEPPED DOWN' if row['stepped_down'] else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    print("model    length memory  limit  plan   peak   error (GiB)")
    if options.tiny:
        rows = run("tiny", cuda=False, vocab=512, lengths=(64, 600), plain=options.plain)
        assert len(rows) == 6 and all(row["predicted"] <= row["limit"] for row in rows), rows
        return
    import torch

    torch.cuda.set_per_process_memory_fraction(CAP)
    rows = []
    for size in options.sizes:
        rows += run(size, cuda=True, vocab=128256, lengths=tuple(options.lengths), plain=options.plain)
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(f"{len(rows)} configurations; worst error {worst['error']:+.1%}")
    name = "memory_plan_plain" if options.plain else "memory_plan"
    print(report.write(name, {"configurations": rows}, folder=options.out))


if __name__ == "__main__":
    main()

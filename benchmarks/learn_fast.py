"""Does the fast road learn what the plain road learns? The same steps of a real model on both, and on the fast road cut into
other micro-batches, which changes rounding alone: how far those two drift apart is the noise. And how far does the fast
road drift when its base multiplies in 8-bit floats?

python -m benchmarks.learn_fast                    # smollm2-135m, 200 steps: minutes on a card, an hour on two cores
python -m benchmarks.learn_fast --model DIR --steps 50
python -m benchmarks.learn_fast --tiny DIR         # a small model folder, 3 steps, nothing written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import report

ROWS = Path(__file__).parents[1] / "recipes" / "data" / "sprocket.jsonl"
LEAST = 5e-4  # of the mean loss: a drift below it is none, whatever the noise; a bf16 number is good for 4e-3
TIMES = 3.0  # a drift within this many times the noise is noise
CUT = 64  # tokens: micro-batches of the third run


def curve(model: str, *, steps: int, batch_size: int, plain: bool = False, **options) -> dict:
    """Losses of `steps` optimiser steps over the same rows in the same order, and the road they took.

    Args:
        options: of the training client.
    """
    from local_tinker import ServiceClient, batches, load_rows
    from local_tinker.engine.local import LocalEngine
    from local_tinker.hardware import detect

    rows = list(load_rows(str(ROWS)))
    with ServiceClient(engine=LocalEngine(detect().kind, plain_road=plain), quiet=True) as service:
        trainer = service.create_lora_training_client(model, rank=16, quantize="4bit", seed=1, **options)
        losses: list[float] = []
        for batch in batches(rows, batch_size=batch_size, epochs=1 + steps * batch_size // len(rows), seed=1):
            if len(losses) == steps:
                break
            losses.append(float(trainer.forward_backward(batch)))
            trainer.optim_step(learning_rate=5e-4)
            if len(losses) % 20 == 0:
                print(f"{'plain' if plain else 'fast'} {options or ''} {len(losses)} {losses[-1]:.4f}", flush=True)
        return {"road": trainer._base.road, "losses": [round(loss, 6) for loss in losses]}


def compare(fast: list[float], plain: list[float], cut: list[float], fp8: list[float]) -> dict:
    """Mean distance of the curves in nats, the noise, and whether the plain road's is within it; 8-bit floats are an
    approximation, of which the distance is said."""

    def distance(a: list[float], b: list[float]) -> float:
        return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)

    drift, noise = distance(fast, plain), distance(fast, cut)
    same = drift <= max(TIMES * noise, LEAST * sum(fast) / len(fast))
    return {"drift": drift, "noise": noise, "same": same, "fp8_drift": distance(fast, fp8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tiny", metavar="DIR", help="a small model folder; 3 steps, nothing written")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    if options.tiny:
        options.model, options.steps = options.tiny, 3
    common = {"steps": options.steps, "batch_size": options.batch_size}
    runs = {
        "fast": curve(options.model, **common),
        "plain": curve(options.model, plain=True, **common),
        "cut": curve(options.model, micro_batch_tokens=CUT, **common),
        "fp8": curve(options.model, compute="fp8", **common),
    }
    assert [run["road"] for run in runs.values()] == ["fast", "plain", "fast", "fast"], "the model has no fast road"
    found = compare(*(run["losses"] for run in runs.values()))
    ends = {name: sum(run["losses"][-10:]) / len(run["losses"][-10:]) for name, run in runs.items()}
    print({**found, "last_ten": ends})
    if not options.tiny:
        figures = {"model": Path(options.model).name, **common, **found, "last_ten": ends, "runs": runs}
        print(report.write("learn_fast", figures, folder=options.out))
    sys.exit(0 if found["same"] else "the curves differ by more than the noise")


if __name__ == "__main__":
    main()

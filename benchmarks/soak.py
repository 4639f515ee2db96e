"""Everything at once for an hour: train, sample, save, rotate, load, fail, close, again; what memory, file handles and disk do.

python -m benchmarks.soak                 # an hour; writes benchmarks/results/soak.json
python -m benchmarks.soak --minutes 1     # a look; writes nothing
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from . import report
from .gpu_loop import random_model

WARM_UP = 0.25  # share of the time that the slopes leave out: allocators and caches find their size in it
ROWS = [{"prompt": f"Question {i}: {i} plus {i}?", "completion": f" It is {2 * i}." * (1 + i % 5)} for i in range(24)]
PAIRS = [{"prompt": f"{i}?", "chosen": f" {i}.", "rejected": " no, no"} for i in range(6)]


def train(trainer, sampler) -> None:
    """One step of each objective."""
    for batch, options in ((ROWS[:8], {}), (PAIRS, {"loss_fn": "dpo"})):
        trainer.forward_backward(batch, **options)
        trainer.optim_step(learning_rate=1e-4)
    groups = sampler.sample_batch([row["prompt"] for row in ROWS[:3]], n=3, max_tokens=12)
    rewards = [[float(len(answer) % 5) for answer in group] for group in groups]
    trainer.forward_backward(groups, rewards, loss_fn="grpo")
    trainer.optim_step(learning_rate=1e-4)
    flat, scores = [c for group in groups for c in group], [r for group in rewards for r in group]
    trainer.forward(flat, scores, loss_fn="ppo")
    trainer.forward_backward(flat, loss_fn="ppo")
    trainer.optim_step(learning_rate=1e-4)


def fail(trainer) -> None:
    """A call that cannot succeed must cost nothing."""
    from local_tinker.errors import LocalTinkerError

    for bad in ([], [{"prompt": "x", "completion": None}], [{"nothing": 1}]):
        try:
            trainer.forward_backward(bad)
        except LocalTinkerError:
            continue
        raise AssertionError(f"{bad} was accepted")


def one_round(service, model: str, folder: Path, number: int) -> None:
    """A trainer's life: begin or load, train, sample in threads, save, rotate, close."""
    from local_tinker.checkpoint import list_checkpoints, rotate

    saved = list_checkpoints(folder)
    if saved and number % 5:
        trainer = service.create_training_client_from_state(saved[-1].path)
    else:
        trainer = service.create_lora_training_client(model, rank=8, quantize="4bit")
    sampler = trainer.save_weights_and_get_sampling_client()
    threads = [threading.Thread(target=lambda: sampler.sample("Question", max_tokens=16)) for _ in range(3)]
    for thread in threads:
        thread.start()
    train(trainer, sampler)
    fail(trainer)
    for thread in threads:
        thread.join()
    "".join(sampler.stream("Question 3", max_tokens=8))
    trainer.save_state(folder / f"step-{number:07d}", extra={"round": number})
    trainer.save_adapter(folder.parent / "adapter", overwrite=True)
    rotate(folder, 2, owner=None)
    sampler.close()
    trainer.close()


def usage(folder: Path) -> dict[str, float]:
    import psutil

    process = psutil.Process()
    return {
        "rss_mb": process.memory_info().rss / 2**20,
        "file_handles": process.num_fds(),
        "threads": process.num_threads(),
        "disk_mb": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20,
    }


def slope_an_hour(times: list[float], values: list[float]) -> float:
    """Least squares, in units of `values` an hour."""
    import numpy as np

    return float(np.polyfit(np.array(times) / 3600, values, 1)[0])


def soak(minutes: float, *, say: Callable[[str], None]) -> dict:
    from local_tinker import ServiceClient

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = str(random_model("tiny", root / "model", vocab=512))
        (root / "work" / "states").mkdir(parents=True)
        service = ServiceClient(device="cpu", quiet=True)
        began, last, rounds, seen = time.monotonic(), -60.0, 0, []
        while (now := time.monotonic() - began) < 60 * minutes:
            rounds += 1
            one_round(service, model, root / "work" / "states", rounds)
            if now - last >= min(20.0, minutes):
                last = now
                seen.append({"seconds": round(now, 1), "rounds": rounds, **usage(root / "work")})
                say(", ".join(f"{name} {value:,.1f}" for name, value in seen[-1].items()))
    steady = [each for each in seen if each["seconds"] >= WARM_UP * 60 * minutes]
    times = [each["seconds"] for each in steady]
    names = ("rss_mb", "file_handles", "threads", "disk_mb")
    slopes = {f"{name}_an_hour": round(slope_an_hour(times, [each[name] for each in steady]), 4) for name in names}
    kept = seen[:: max(1, len(seen) // 60)]
    return {"minutes": minutes, "rounds": rounds, "optimiser_steps": 4 * rounds, "slopes": slopes, "samples": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    figures = soak(minutes, say=lambda line: print(line, flush=True))
    print(figures["slopes"])
    if minutes >= 60:
        print(report.write("soak", figures))


if __name__ == "__main__":
    main()

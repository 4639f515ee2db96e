"""First figures on a CPU: start-up times of the command line, a quickstart step, memory.

python -m benchmarks.cpu            # writes benchmarks/results/cpu.json
python -m benchmarks.cpu --tiny DIR # a model folder instead of smollm2-135m, nothing written
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from . import report

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import local_tinker": ["-c", "import local_tinker"],
    "from local_tinker import ServiceClient": ["-c", "from local_tinker import ServiceClient"],
    "local-tinker --help": ["-m", "local_tinker", "--help"],
    "local-tinker run --help": ["-m", "local_tinker", "run", "--help"],
    "local-tinker models": ["-m", "local_tinker", "models"],
}


def wall(arguments: list[str], runs: int) -> float:
    """Median seconds of a whole process."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training(model: str, steps: int) -> dict:
    """Seconds a step of the quickstart's kind (4 short chats, NF4 base, rank 16), decoding rate, peak memory."""
    from local_tinker import ServiceClient

    question = [{"role": "user", "content": "Who are you?"}]
    rows = [
        {"messages": [*question, {"role": "assistant", "content": "I am Captain Tinker, and I sail the seven seas."}]}
    ] * 4
    start = time.perf_counter()
    trainer = ServiceClient(quiet=True).create_lora_training_client(model, rank=16)
    loaded = time.perf_counter() - start
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(trainer.forward_backward(rows)))
        trainer.optim_step(learning_rate=2e-3)
        times.append(time.perf_counter() - start)
    tokens = sum(len(trainer.renderer.conversation(row["messages"]).tokens) for row in rows)
    sampler = trainer.save_weights_and_get_sampling_client()
    sampler.sample(question, max_tokens=2)
    start = time.perf_counter()
    done = sampler.sample(question, max_tokens=32, stop=[])
    decoding = time.perf_counter() - start
    return {
        "load_s": round(loaded, 2),
        "step_s": round(statistics.median(times[1:]), 3),
        "tokens_a_step": tokens,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "decode_tokens_per_s": round(len(done.tokens) / decoding, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def group_update(model: str, *, prompt: int, new: int, samples: int = 8, rounds: int) -> dict:
    """Seconds of a GRPO update of one group, its prompt computed once and, for comparison, for every completion."""
    from local_tinker import Rollout, ServiceClient
    from local_tinker.engine import micro_batch

    with ServiceClient(device="cpu", quiet=True) as service:
        trainer = service.create_lora_training_client(model, rank=16, dtype="float32")
        asked = tuple(10 + at % 200 for at in range(prompt))
        group = [
            Rollout(asked, tuple(10 + (i + at) % 200 for at in range(new)), (True,) * new, (-3.0,) * new, "stop", "any")
            for i in range(samples)
        ]
        rewards = [[float(i % 3) for i in range(samples)]]
        times: dict[str, list[float]] = {"prompt_once": [], "prompt_repeated": []}
        least = micro_batch.LEAST_HEAD
        try:
            for turn in range(2 * rounds + 2):
                name, micro_batch.LEAST_HEAD = [("prompt_once", least), ("prompt_repeated", 10**9)][turn % 2]
                start = time.perf_counter()
                float(trainer.forward_backward([group], rewards, loss_fn="grpo"))
                trainer.optim_step(learning_rate=1e-5)
                times[name].append(time.perf_counter() - start)
        finally:
            micro_batch.LEAST_HEAD = least
    medians = {name: round(statistics.median(found[1:]), 2) for name, found in times.items()}  # the first is warming up
    return {"prompt": prompt, "new": new, "samples": samples, **medians}


def sampling(model: str, *, batches: tuple[int, ...], prompt: int, new: int, rounds: int, threads: int = 2) -> dict:
    """Greedy tokens a second beside transformers' generate: fp32, distinct prompts of one length, the same tokens from
    both. The sides take turns and the median of each counts; `first_s` is a call for one new token."""
    import torch
    from transformers import AutoModelForCausalLM

    from local_tinker import ServiceClient
    from local_tinker.model.catalogue import resolve

    folder = str(resolve(model).path)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab = theirs.config.vocab_size
    figures = {"prompt": prompt, "new": new, "threads": threads}
    with ServiceClient(device="cpu", quiet=True) as service:
        sampler = service.create_sampling_client(folder, quantize=None, dtype="float32")
        for batch in batches:
            shape, generator = (batch, prompt), torch.Generator().manual_seed(batch)
            ids = torch.randint(10, vocab - 10, shape, generator=generator)
            sides = {"ours": _ours(sampler, ids), "transformers": _theirs(theirs, ids)}
            same = len({str(side(new)) for side in sides.values()}) == 1  # and everything is warm
            figures[f"batch {batch}"] = {**_alternately(sides, new, rounds), "same_tokens": same}
            print(json.dumps({f"batch {batch}": figures[f"batch {batch}"]}), file=sys.stderr, flush=True)
    torch.set_num_threads(before)
    return figures


def _ours(sampler, ids) -> Callable[[int], list[list[int]]]:
    asked = ids.tolist()
    return lambda new: [list(c.tokens) for c in sampler.sample_batch(asked, max_tokens=new, temperature=0, stop=[])]


def _theirs(model, ids) -> Callable[[int], list[list[int]]]:
    import torch

    given = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
    return lambda new: model.generate(ids, max_new_tokens=new, **given)[:, ids.shape[1] :].tolist()


def _alternately(sides: dict, new: int, rounds: int) -> dict:
    """Median seconds of a first token and tokens a second of a whole call, the sides taking turns."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            for count in (1, new):
                start = time.perf_counter()
                rows = len(side(count))
                times.setdefault((name, count), []).append(time.perf_counter() - start)
    found = {}
    for name in sides:
        first, whole = (statistics.median(times[name, count]) for count in (1, new))
        found[name] = {"tok_s": round(rows * new / whole, 1), "first_s": round(first, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", metavar="DIR", help="a model folder to use instead; nothing is written")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    figures = {name: round(wall(arguments, options.runs), 3) for name, arguments in COMMANDS.items()}
    figures |= training(options.tiny or "smollm2-135m", options.steps)
    tiny = {"prompt": 40, "new": 4, "rounds": 1}
    figures["group_update"] = group_update(
        options.tiny or "smollm2-135m", **(tiny if options.tiny else {"prompt": 128, "new": 64, "rounds": 3})
    )
    size = (
        dict(batches=(1, 8), prompt=8, new=4, rounds=1)
        if options.tiny
        else dict(batches=(1, 8, 32), prompt=64, new=32, rounds=3)
    )
    figures["sampling"] = sampling(options.tiny or "smollm2-135m", **size)
    print(json.dumps(figures, indent=2))
    if not options.tiny:
        print(report.write("cpu", figures))


if __name__ == "__main__":
    main()

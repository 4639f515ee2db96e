"""Sampling on one card: ours and transformers' generate on the same work, beside what the card can do.

python -m benchmarks.sample                                  # Llama-3.2-3B's size, the whole table
python -m benchmarks.sample --sizes qwen7b --cases 64x8,256x8
python -m benchmarks.sample --cases 64x8 --modes parts,skew --new 256
python -m benchmarks.sample --tiny                           # seconds on a CPU, nothing written

A case is BATCHxGROUP: so many completions in all, GROUP of them to a prompt. Weights are random, end tokens are ignored,
so every completion has --new tokens. The roofline of a decoding step is the larger of weights / bandwidth and products /
arithmetic, plus keys and values / bandwidth with a shared prompt read once; bandwidth and arithmetic are measured in the
same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from . import models, report

MODES = ("ours", "base", "nf4", "deterministic", "hf", "parts", "update", "skew")
PARTS = (
    ("attention", ("_attend_splits", "_combine")),
    ("draw", ("_block_stats", "_pick_token", "_advance")),
    ("small", ("norm", "_rope_write", "_gated", "_add_low_rank", "_turn_angles", "elementwise", "Memcpy")),
    ("products", ("gemm", "nvjet", "cutlass", "splitK", "gemv", "kgemm", "cublas", "nf4_rows")),
)


@dataclass(frozen=True)
class Case:
    size: str
    batch: int
    group: int
    prompt: int
    new: int

    def prompts(self) -> list[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(1)
        vocab = models.SIZES[self.size][1]["vocab"]
        shape = (max(1, self.batch // self.group), self.prompt)
        return torch.randint(10, vocab - 10, shape, generator=generator).tolist()

    def roofline(self, card: dict, *, linear_bytes: float = 2.0) -> float:
        """Seconds of a mean decoding step at the limit."""
        weights, kv, parameters = models.step_bytes(self.size, linear_bytes=linear_bytes)
        tokens = self.batch / self.group * self.prompt + self.batch * self.new / 2
        return max(weights / card["read"], 2 * parameters * self.batch / card["flops"]) + tokens * kv / card["read"]


def timed_run(function) -> tuple[float, float]:
    """Seconds, and the peak of device memory in GiB."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def line(case: Case, mode: str, total: float, first: float, peak: float, card: dict | None, **extra) -> dict:
    step = (total - first) / max(1, case.new - 1)
    figures = {
        "mode": mode,
        "size": case.size,
        "batch": case.batch,
        "group": case.group,
        "prompt": case.prompt,
        "new": case.new,
        "tok_s": round(case.batch * case.new / total, 1),
        "decode_tok_s": round(case.batch / step, 1),
        "step_ms": round(step * 1e3, 3),
        "prefill_s": round(first, 3),
        "peak_gib": round(peak, 2),
    }
    linear_bytes = extra.pop("linear_bytes", 2.0)
    if card is not None:
        roofline = case.roofline(card, linear_bytes=linear_bytes)
        figures |= {"roofline_ms": round(roofline * 1e3, 3), "share": round(roofline / step, 3)}
    figures |= extra
    print(json.dumps(figures), flush=True)
    return figures


def sample(client, case: Case, *, new: int | None = None, **settings) -> None:
    n = None if case.group == 1 else case.group
    client.sample_batch(case.prompts(), n, max_tokens=new or case.new, stop=[], seed=1, **settings)


def ours(client, case: Case, mode: str, card: dict | None, *, linear_bytes: float = 2.0, **settings) -> dict:
    warm, _ = timed_run(lambda: sample(client, case, **settings))  # compiles kernels and records the step
    first, _ = timed_run(lambda: sample(client, case, new=1, **settings))
    total, peak = timed_run(lambda: sample(client, case, **settings))
    return line(case, mode, total, first, peak, card, linear_bytes=linear_bytes, warm_s=round(warm, 2))


def huggingface(folder: Path, cases: list[Case], card: dict | None, *, new: int | None) -> list[dict]:
    """model.generate with its defaults, sampling at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    found = []
    for case in cases:
        case = Case(case.size, case.batch, case.group, case.prompt, new or case.new)
        ids = torch.tensor(case.prompts(), device=device)
        given = dict(
            attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, num_return_sequences=case.group,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

        def run(count: int, model=model, ids=ids, given=given) -> None:
            with torch.no_grad():
                model.generate(ids, max_new_tokens=count, **given)

        run(4)
        first, _ = timed_run(lambda run=run: run(1))
        total, peak = timed_run(lambda run=run, case=case: run(case.new))
        found.append(line(case, "hf", total, first, peak, card))
    return found


def parts(client, case: Case) -> dict:
    """Microseconds of a decoding step by kind of kernel: a longer run's kernels less a shorter one's."""
    from torch.profiler import ProfilerActivity, profile

    sums = []
    half = case.new // 2
    for new in (half + 32, half):
        sample(client, case, new=new)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            sample(client, case, new=new)
        sums.append({event.key: event.self_device_time_total for event in seen.key_averages()})
    spent = {key: (sums[0][key] - sums[1].get(key, 0.0)) / 32 for key in sums[0]}
    found: dict = {"mode": "parts", "size": case.size, "batch": case.batch, "group": case.group, "prompt": case.prompt}
    rest = dict(spent)
    for name, marks in PARTS:
        keys = [key for key in rest if any(mark in key for mark in marks)]
        found[f"{name}_us"] = round(sum(rest.pop(key) for key in keys), 1)
    found["other_us"] = round(sum(rest.values()), 1)
    found["most"] = {key[:60]: round(us, 1) for key, us in sorted(spent.items(), key=lambda kv: -kv[1])[:14]}
    print(json.dumps(found), flush=True)
    return found


def update(trainer, case: Case) -> dict:
    """Milliseconds from trained weights to a sampling client, and to its first token."""
    import torch

    times = []
    prompt = case.prompts()[0][:32]
    for i in range(6):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        client = trainer.save_weights_and_get_sampling_client()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        made = time.perf_counter()
        client.sample(prompt, max_tokens=1, seed=i)
        times.append((made - start, time.perf_counter() - start))
    made, first = (sorted(column)[len(times) // 2] * 1e3 for column in zip(*times, strict=True))
    figures = {
        "mode": "update",
        "size": case.size,
        "update_ms": round(made, 2),
        "update_and_first_token_ms": round(first, 2),
    }
    print(json.dumps(figures), flush=True)
    return figures


def skew(client, case: Case, step_ms: dict[int, float], *, requests: int = 512) -> dict:
    """Lengths from a log-normal with p95 / p5 = 10, against a scheduler that fills every free row at once and never
    waits, at the measured step times."""
    import math

    import torch

    from local_tinker.sampler.sequence import Request, SamplingParams

    sigma = math.log(10) / (2 * 1.6449)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.exp(torch.randn(requests, generator=generator) * sigma) * case.new / 2
    lengths = drawn.round().clamp(8, 4 * case.new).long().tolist()
    wide = Case(case.size, requests, 1, case.prompt, case.new)
    asked = [
        Request(tuple(p), SamplingParams(max_tokens=n), seed=i)
        for i, (p, n) in enumerate(zip(wide.prompts(), lengths, strict=True))
    ]

    def run(chosen: list) -> None:
        for _ in client._engine.sample(client._snapshot.id, chosen):
            pass

    run(asked[: requests // 2])
    total, peak = timed_run(lambda: run(asked))
    prefill, _ = timed_run(lambda: run([Request(r.prompt_tokens, SamplingParams(max_tokens=1), seed=1) for r in asked]))
    ideal = ideal_seconds(lengths, case.batch, step_ms) + prefill
    figures = {
        "mode": "skew", "size": case.size, "requests": requests, "rows": case.batch, "prompt": case.prompt,
        "tokens": sum(lengths), "tok_s": round(sum(lengths) / total, 1), "ideal_s": round(ideal, 2),
        "total_s": round(total, 2), "share_of_ideal": round(ideal / total, 3), "peak_gib": round(peak, 2),
        "step_ms": step_ms,
    }  # fmt: skip
    print(json.dumps(figures), flush=True)
    return figures


def ideal_seconds(lengths: list[int], rows: int, step_ms: dict[int, float]) -> float:
    """The list schedule of these lengths on so many rows, a step with b rows taking the time of the next measured size."""
    waiting, running, seconds = list(reversed(lengths)), [], 0.0
    while waiting or running:
        while waiting and len(running) < rows:
            running.append(waiting.pop())
        steps = min(running)
        size = next((b for b in sorted(step_ms) if b >= len(running)), max(step_ms))
        seconds += steps * step_ms[size] / 1e3
        running = [left - steps for left in running if left > steps]
    return seconds


def one_size(size: str, cases: list[Case], modes: list[str], options, card: dict | None) -> list[dict]:
    import torch

    from local_tinker import ServiceClient
    from local_tinker.model.kernels.nf4_rows import MOST_ROWS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder, found = models.folder_for(size), []
    try:
        models.random_model(size, folder, device=device)
        clear()
        if "hf" in modes:
            found += huggingface(folder, cases, card, new=options.hf_new)
            clear()
        start = time.perf_counter()
        service = ServiceClient(device=device, quiet=True)
        dtype = "bfloat16" if device == "cuda" else "float32"
        trainer = service.create_lora_training_client(str(folder), rank=options.rank, quantize=None, dtype=dtype)
        client = trainer.save_weights_and_get_sampling_client()
        client.sample(cases[0].prompts()[0][:32], max_tokens=1)
        found.append({"mode": "start", "size": size, "first_token_s": round(time.perf_counter() - start, 2)})
        print(json.dumps(found[-1]), flush=True)
        for mode, chosen in (("ours", client), ("deterministic", client)):
            for case in cases if mode in modes else ():
                settings = {"deterministic": True} if mode == "deterministic" else {}
                found.append(ours(chosen, case, mode, card, **settings))
        if "parts" in modes and card is not None:
            found += [parts(client, case) for case in cases]
        if "update" in modes:
            found.append(update(trainer, cases[0]))
        if "skew" in modes:
            steps = {f["batch"]: f["step_ms"] for f in found if f["mode"] == "ours" and f["group"] == 1}
            rows = max(steps, default=0)
            if rows:
                found.append(skew(client, Case(size, rows, 1, options.prompt, options.new), steps))
        del client
        if "base" in modes:
            plain = service.create_sampling_client(str(folder), quantize=None, dtype=dtype)
            found += [ours(plain, case, "base", card) for case in cases]
            del plain
        del trainer
        service.close()
        clear()
        if "nf4" in modes:
            service = ServiceClient(device=device, quiet=True)
            trainer = service.create_lora_training_client(str(folder), rank=options.rank, quantize="4bit", dtype=dtype)
            small = trainer.save_weights_and_get_sampling_client()
            found += [
                ours(small, case, "nf4", card, linear_bytes=0.516 if case.batch <= MOST_ROWS else 2.0) for case in cases
            ]
            del small, trainer
            service.close()
            clear()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def clear() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="llama3b", help=f"of {', '.join(models.SIZES)}")
    parser.add_argument("--cases", default="1x1,64x1,64x8,256x1,256x8")
    parser.add_argument("--modes", default=",".join(MODES), help="of " + ", ".join(MODES))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--hf-new", type=int, help="fewer new tokens for transformers, which is slow")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--name", default="sample")
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.cases, options.prompt, options.new, options.rank = "tiny", "1x1,4x2", 24, 12, 4
    import torch

    card = models.card_speed() if torch.cuda.is_available() and not options.tiny else None
    if card is not None:
        print(json.dumps({"mode": "card", **{k: float(f"{v:.4g}") for k, v in card.items()}}), flush=True)
        clear()
    found = [] if card is None else [{"mode": "card", **card}]
    for size in options.sizes.split(","):
        pairs = [tuple(int(n) for n in text.split("x")) for text in options.cases.split(",")]
        cases = [Case(size, batch, group, options.prompt, options.new) for batch, group in pairs]
        found += one_size(size, cases, options.modes.split(","), options, card)
        if not options.tiny:
            report.write(options.name, {"lines": found}, folder=options.out)


if __name__ == "__main__":
    main()

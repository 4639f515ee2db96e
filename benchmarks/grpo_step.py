"""One GRPO step end to end, ours and TRL's GRPOTrainer with transformers' generation, one after the other on one card.

python -m benchmarks.grpo_step                    # Llama-3.2-3B's size, 32 prompts x 8, 512 + 512 tokens
python -m benchmarks.grpo_step --sides ours --steps 3
python -m benchmarks.grpo_step --tiny             # seconds on a CPU, nothing written

Each side runs in a process of its own on the same random weights and prompts; every completion has --new tokens, rewards
are random. Both train LoRA on all linear projections of a bf16 base with AdamW and no KL term. Ours also scores the
rollout with the trainer before the update, which TRL's defaults do not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import models, report

SIDES = ("ours", "trl")


def prompts(count: int, length: int) -> list[str]:
    """Texts of so many letters, each a token of the benchmark's byte-level tokenizer."""
    letters = random.Random(0)
    return ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


def reward(count: int, seed: int) -> list[float]:
    return [random.Random(seed * 10_000 + i).random() for i in range(count)]


class Clock:
    """Seconds since the last reading, the device's work included."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before = getattr(self, "_at", 0.0)
        self._at = time.perf_counter()
        return round(self._at - before, 3)


def ours(options: argparse.Namespace) -> dict:
    import torch

    from local_tinker import ServiceClient

    cuda = torch.cuda.is_available()
    service = ServiceClient(device="cuda" if cuda else "cpu", quiet=True)
    dtype = "bfloat16" if cuda else "float32"
    trainer = service.create_lora_training_client(options.folder, rank=options.rank, quantize=None, dtype=dtype)
    asked, steps = prompts(options.prompts, options.prompt), []
    for step in range(options.steps + 1):  # the first compiles and records
        if cuda and step == 1:
            torch.cuda.reset_peak_memory_stats()
        clock = Clock()
        sampler = trainer.save_weights_and_get_sampling_client()
        update_weights = clock.read()
        groups = sampler.sample_batch(asked, options.group, max_tokens=options.new, stop=[], seed=step)
        rollout = clock.read()
        rewards = [reward(options.group, seed=step * 1000 + i) for i in range(len(groups))]
        scored = trainer.forward(groups, rewards, loss_fn="grpo")
        gap = max(
            abs(float(a) - float(b))
            for mine, completion in zip(scored.logprobs, [c for g in groups for c in g], strict=True)
            for a, b in zip(list(mine)[-len(completion.tokens) :], completion.logprobs, strict=True)
        )
        scoring = clock.read()
        trainer.forward_backward(groups, rewards, loss_fn="grpo")
        trainer.optim_step(learning_rate=1e-5)
        steps.append(
            dict(
                weights_s=update_weights,
                rollout_s=rollout,
                scoring_s=scoring,
                update_s=clock.read(),
                gap_max=round(gap, 4),
            )
        )
    return {"side": "ours", "first": steps[0], "steps": steps[1:], **_summary(steps[1:])}


def _summary(steps: list[dict]) -> dict:
    import torch

    totals = sorted(sum(v for k, v in step.items() if k.endswith("_s")) for step in steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"step_s": round(totals[len(totals) // 2], 2), "peak_gib": round(peak, 2)}


def trl(options: argparse.Namespace) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16 if cuda else torch.float32)
    total, micro = options.prompts * options.group, min(options.trl_micro, options.prompts * options.group)
    steps: list[dict] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.clock = Clock()

        def on_step_end(self, *_, **__):
            steps.append({"all_s": self.clock.read()})

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=total // micro,
                num_generations=options.group,
                max_completion_length=options.new,
                generation_kwargs={"min_new_tokens": options.new},
                temperature=1.0,
                beta=0.0,
                max_steps=options.trl_steps,
                learning_rate=1e-5,
                bf16=cuda,
                gradient_checkpointing=True,
                report_to="none",
                save_strategy="no",
                logging_steps=10**9,
                use_cpu=not cuda,
                disable_tqdm=True,
            ),
            reward_funcs=lambda completions, **_: reward(len(completions), seed=1),
            train_dataset=Dataset.from_dict({"prompt": prompts(options.prompts, options.prompt) * 2}),
            processing_class=AutoTokenizer.from_pretrained(options.folder),
            peft_config=LoraConfig(
                r=options.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
            ),
            callbacks=[Watch()],
        )
        trainer.train()
    return {"side": "trl", "micro": micro, "steps": steps, **_summary(steps[-1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="llama3b", help=f"of {', '.join(models.SIZES)}")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--trl-steps", type=int, default=1, help="its last step is reported")
    parser.add_argument("--trl-micro", type=int, default=8, help="completions of a micro-batch of TRL")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.size, options.prompts, options.group, options.prompt, options.new, options.rank = "tiny", 2, 2, 12, 6, 4
        options.steps = 1
    if options.side:
        print(json.dumps({"ours": ours, "trl": trl}[options.side](options)), flush=True)
        return
    import torch

    folder, found = models.folder_for(options.size), []
    try:
        models.random_model(options.size, folder, device="cuda" if torch.cuda.is_available() else "cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        arguments = [a for a in sys.argv[1:] if a != "--tiny"] + (["--tiny"] if options.tiny else [])
        for side in options.sides.split(","):
            command = [
                sys.executable,
                "-m",
                "benchmarks.grpo_step",
                *arguments,
                "--side",
                side,
                "--folder",
                str(folder),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                found.append({"side": side, "failed": done.returncode})
            else:
                found.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(json.dumps(found[-1]), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not options.tiny:
        report.write(
            "grpo_step", {"work": vars(options) | {"out": str(options.out)}, "sides": found}, folder=options.out
        )


if __name__ == "__main__":
    main()

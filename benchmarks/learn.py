"""Do the objectives learn? Real SmolLM2-135M-Instruct on an NF4 base, several seeds, held-out measures before and after.

python -m benchmarks.learn grpo --seeds 1 2 3     # raises a verifiable reward: one-digit sums
python -m benchmarks.learn ppo --seeds 1 2 3      # the same with the value head
python -m benchmarks.learn dpo --seeds 1 2 3      # turns a stated preference: short answers over rambling ones
python -m benchmarks.learn plot                   # benchmarks/results/learn_*.json -> docs/learning.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from . import report

MODEL = "smollm2-135m"
PREFERENCES = Path(__file__).parents[1] / "recipes" / "data" / "concise_pairs.jsonl"


def correct(completion, row) -> float:
    """1 for the right number, nothing else counts."""
    from local_tinker.rewards import extract_number

    found = extract_number(completion)
    return float(found is not None and float(found) == float(row["answer"]))


def problems(count: int, seed: int) -> list[dict]:
    from local_tinker.recipes.arithmetic import arithmetic

    return [dict(row) for row in arithmetic(count, seed)]


def accuracy(trainer, rows: list[dict]) -> float:
    """Share of held-out problems answered right, greedily."""
    sampler = trainer.save_weights_and_get_sampling_client()
    answers = sampler.sample_batch([row["prompt"] for row in rows], max_tokens=8, temperature=0)
    return sum(correct(a, row) for a, row in zip(answers, rows, strict=True)) / len(rows)


def rl(trainer, seed: int, *, objective: str, steps: int, learning_rate: float) -> Iterator[dict]:
    """One on-policy step an iteration: 4 prompts x 8 answers (grpo), 32 prompts x 1 (ppo)."""
    rows = problems(4096, seed)
    prompts_a_step, n = (4, 8) if objective == "grpo" else (32, 1)
    for i in range(steps):
        chosen = rows[i * prompts_a_step : (i + 1) * prompts_a_step]
        prompts = [row["prompt"] for row in chosen]
        groups = trainer.save_weights_and_get_sampling_client().sample_batch(prompts, n=n, max_tokens=8)
        rewards = [[correct(c, row) for c in group] for group, row in zip(groups, chosen, strict=True)]
        passes = 1
        if objective == "ppo":
            groups, rewards = [g[0] for g in groups], [r[0] for r in rewards]
            trainer.forward(groups, rewards, loss_fn="ppo")
            passes = 2
        for _ in range(passes):
            loss = trainer.forward_backward(groups, rewards, loss_fn=objective)
            trainer.optim_step(learning_rate=learning_rate)
        m = loss.metrics
        yield {"reward": m["reward_mean"], "entropy": m.get("entropy"), "gap": m.get("logprob_gap_mean")}


def preferences(trainer, seed: int, *, steps: int, learning_rate: float) -> Iterator[dict]:
    from local_tinker import batches, load_rows

    rows = list(load_rows(str(PREFERENCES)))[8:]
    for batch in list(batches(rows, batch_size=4, epochs=10, seed=seed))[:steps]:
        loss = trainer.forward_backward(batch, loss_fn="dpo", beta=0.1)
        trainer.optim_step(learning_rate=learning_rate)
        yield {"loss": float(loss), "accuracy": loss.metrics["accuracy"], "margin": loss.metrics["reward_margin"]}


def preference_measure(trainer) -> dict:
    """Held-out pairs: how often the preferred answer has gained more than the other; and how long sampled answers are."""
    from local_tinker import load_rows

    rows = list(load_rows(str(PREFERENCES)))[:8]
    metrics = trainer.forward(rows, loss_fn="dpo").metrics
    sampler = trainer.save_weights_and_get_sampling_client()
    answers = sampler.sample_batch([row["prompt"] for row in rows], max_tokens=48, temperature=0)
    return {
        "accuracy": metrics["accuracy"],
        "margin": metrics["reward_margin"],
        "answer_tokens": sum(len(a.tokens) for a in answers) / len(answers),
    }


def run(objective: str, seed: int, *, steps: int, learning_rate: float, model: str, eval_rows: int) -> dict:
    from local_tinker import ServiceClient

    trainer = ServiceClient(quiet=True).create_lora_training_client(model, rank=16, seed=seed)
    held_out = problems(eval_rows, 10_000)

    def measure() -> dict:
        return preference_measure(trainer) if objective == "dpo" else {"accuracy": accuracy(trainer, held_out)}

    before, curve = measure(), []
    if objective == "dpo":
        steps_of = preferences(trainer, seed, steps=steps, learning_rate=learning_rate)
    else:
        steps_of = rl(trainer, seed, objective=objective, steps=steps, learning_rate=learning_rate)
    for i, point in enumerate(steps_of):
        curve.append(point)
        print(objective, seed, i, {k: round(v, 4) for k, v in point.items() if v is not None}, flush=True)
    after = measure()
    print(objective, seed, "before", before, "after", after, flush=True)
    return {"seed": seed, "before": before, "after": after, "curve": curve, "learning_rate": learning_rate}


def plot() -> Path:
    """The curves of all seeds, one panel an objective."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("grpo", "reward", "GRPO: share of right answers"),
        ("ppo", "reward", "PPO: share of right answers"),
        ("dpo", "margin", "DPO: reward margin"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, (name, key, title) in zip(axes, panels, strict=True):
        path = report.RESULTS / f"learn_{name}.json"
        if not path.is_file():
            continue
        for result in json.loads(path.read_text())["figures"]["runs"]:
            values = [point[key] for point in result["curve"]]
            smooth = [
                sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))
            ]
            axis.plot(range(1, len(values) + 1), smooth, label=f"seed {result['seed']}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step (mean of the last 5)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    out = Path(__file__).parents[1] / "docs" / "learning.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=("grpo", "ppo", "dpo", "plot"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    if options.objective == "plot":
        print(plot())
        return
    runs = []
    for seed in options.seeds:
        runs.append(
            run(
                options.objective,
                seed,
                steps=options.steps,
                learning_rate=options.learning_rate,
                model=options.model,
                eval_rows=options.eval_rows,
            )
        )
        if not options.no_write:  # after every seed: a long run that is cut keeps what it has
            report.write(f"learn_{options.objective}", {"model": options.model, "runs": runs})


if __name__ == "__main__":
    main()

"""A training run as the battery sees it: how it is started, killed and continued, and all that it came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from local_tinker.checkpoint import latest_valid, read_folder
from local_tinker.runs import list_runs

from .forks import KILLED, Forks

# What a clock or the machine decides.
_VOLATILE = ("time", "tokens_per_second", "memory_bytes")
QUESTIONS = ["one", "the fox", "dog?", "What is one plus two?", "4", "lazy dog", "quick brown", "0123", "over the"]
ANSWERS = ["two three", "jumps over", "The quick fox.", "Three.", "5", "brown", "fox jumps", "456789", "lazy dog"]
LOSSES = {
    "sft": {"dropout": 0.1, "learning-rate": "1e-2", "schedule": "cosine", "warmup": 2, "eval-fraction": 0.2, "eval-every": 2},
    "dpo": {"learning-rate": "1e-2", "schedule": "linear", "eval-fraction": 0.2, "eval-every": 2},
    "grpo": {"group-size": 4, "max-tokens": 6, "beta": 0.04, "learning-rate": "1e-2"},
    "ppo": {"ppo-epochs": 2, "minibatches": 2, "max-tokens": 6, "beta": 0.01, "learning-rate": "1e-2"},
}  # fmt: skip
BASES = {
    "fp32": {"quantize": "none", "dtype": "float32"},
    "bf16": {"quantize": "none", "dtype": "bfloat16"},
    "nf4": {"quantize": "4bit", "dtype": "bfloat16"},
    "int8": {"quantize": "8bit", "dtype": "bfloat16"},
}


def write_data(folder: Path) -> dict[str, str]:
    """Datasets for every loss, and a reward of which every answer earns something else."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    pairs = [{"prompt": q, "chosen": a, "rejected": a + " 0123456789"} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    for name, values in {"rows": rows, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (folder / "mine.py").write_text("def score(completion, answer):\n    return sum(map(ord, completion)) % 7 / 6\n")
    return {
        "sft": str(folder / "rows.jsonl"),
        "dpo": str(folder / "pairs.jsonl"),
        "grpo": "arithmetic",
        "ppo": "arithmetic",
    }


class Subject:
    """One configuration, run whole or in pieces under `folder`."""

    def __init__(self, forks: Forks, folder: Path, model: Path, loss: str, base: str, **changes: Any) -> None:
        self._forks, self.folder = forks, folder
        folder.mkdir(parents=True)
        data = write_data(folder)
        flags = {
            "model": model, "dataset": data[loss], "rank": 4, "batch-size": 3, "epochs": 2, "save-every": 1,
            "samples": 1, "output-dir": folder / "runs", **LOSSES[loss], **BASES[base],
        }  # fmt: skip
        if loss in ("grpo", "ppo"):
            flags |= {"limit": 6, "batch-size": 2, "reward": f"{folder / 'mine.py'}:score"}
        flags |= changes
        self._argv = ["run", "--loss", loss, *(word for key, value in flags.items() for word in (f"--{key}", value))]

    def start(self, *, check: bool = True, **job: Any) -> int:
        """Run (or go on with) it in a process of its own; returns the exit code."""
        paths = {"trace": str(self.folder / "trace.jsonl"), "final": str(self.folder / "final")}
        code = self._forks.run(self._argv, log=self.folder / "log", **paths, **job)
        if check:
            assert code == (KILLED if job.get("kill") else 0), self.log()
        return code

    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    @property
    def run(self):
        """The newest: one killed before its first checkpoint is begun anew, beside what it left."""
        return list_runs(self.folder / "runs")[-1]

    def check_checkpoints(self) -> None:
        """Everything listed can be read to the last byte, and no leftover stays behind once somebody looks."""
        run = self.run
        for path in run.checkpoints.iterdir():
            if not path.name.startswith("."):
                read_folder(path)

    def result(self) -> dict[str, Any]:
        """All that must be the same however often it was killed: batches, samples, log-probs, metrics, every tensor."""
        steps = {}
        for line in (self.folder / "trace.jsonl").read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            steps[row["step"]] = row
        run = self.run
        assert run.status == "finished", (run.status, run.cause)
        final = read_folder(self.folder / "final")
        meta = {name: value for name, value in final.meta["state"].items() if name != "uid"}
        return {
            "steps": steps,
            "metrics": [{k: v for k, v in row.items() if k not in _VOLATILE} for row in run.metrics()],
            "tensors": {name: entry.sha256 for name, entry in final.manifest.items() if name.endswith("safetensors")},
            "state": meta,
            "extra": final.meta["extra"],
            "adapter": read_folder(run.adapter).manifest["adapter_model.safetensors"].sha256,
            "best": run.record.get("best"),
        }

    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        if not list_runs(self.folder / "runs"):
            return 0
        found = latest_valid(self.run.checkpoints)
        return 0 if found is None else found.meta["extra"]["step"]


def assert_same(result: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Part by part, so that a failure names what differs."""
    for part, value in wanted.items():
        assert result[part] == value, part

"""Supervised fine-tuning: the model learns to give the answers of the rows.

`python -m local_tinker.recipes.sft --model smollm2-135m --dataset rows.jsonl`, or `local-tinker run`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hardware import detect
from . import loop, probe, report
from .config import Common, option

if TYPE_CHECKING:
    from ..runs import Run
    from .data import Data


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of a supervised run."""

    dropout: float = option(0.0, "Dropout on the adapter's input.", aliases=("lora_dropout",), least=0, below=1)

    def client(self) -> dict[str, Any]:
        return {**super().client(), "dropout": self.dropout}


def main(config: Config, *, dry_run: bool = False, resume: Run | None = None) -> Path | None:
    """Train and report; returns the run's folder, or None after a dry run."""
    from .data import check_data

    trainer, data = loop.prepare(config, "sft")
    data, found = check_data(
        data, config, trainer.renderer, loss="sft", longest=loop.model_length(config.model), say=report.say
    )
    report.print_preflight(found)
    if dry_run:
        return None
    probe.try_rows(trainer, detect(), config, found)
    return loop.finish(train(config, trainer, data, resume=resume))


def train(config: Config, trainer: Any, data: Data, *, resume: Run | None = None) -> loop.Session:
    """The loop: one forward_backward and one optim_step a batch."""

    def evaluate() -> dict[str, float]:
        return {"eval_loss": float(trainer.forward(data.held_out))}  # per trained token, over all held-out rows

    order = loop.order_of(config, data)
    with loop.Session(config, trainer, order, data, loss="sft", resume=resume, evaluate=evaluate) as session:
        for batch in session:
            loss = trainer.forward_backward(batch)
            step = trainer.optim_step(session.adam)
            session.log(loss, step)
    return session


if __name__ == "__main__":
    from .command import start

    sys.exit(start("sft"))

"""Direct preference optimisation (arXiv 2305.18290): chosen answers become likelier than rejected ones.

The reference is the base model itself (the adapter at scale 0), so no second model is loaded.
`python -m local_tinker.recipes.dpo --model smollm2-135m --dataset pairs.jsonl`, or `local-tinker run --loss dpo`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..hardware import detect
from . import loop, probe, report
from .config import Common, option

if TYPE_CHECKING:
    from ..runs import Run
    from .data import Data


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of a preference run; rows hold prompt, chosen and rejected."""

    beta: float = option(
        0.1, "How far the policy may leave the reference: small is far.", aliases=("dpo_beta",), above=0
    )
    variant: Literal["sigmoid", "ipo"] = option("sigmoid", "Form of the loss.", aliases=("loss_type",))
    label_smoothing: float = option(0.0, "Share of pairs taken to be labelled the wrong way round.", least=0, below=0.5)
    reference_free: bool = option(False, "Leave the reference out.")

    def options(self) -> dict[str, Any]:
        """Options of the loss."""
        return {name: getattr(self, name) for name in ("beta", "variant", "label_smoothing", "reference_free")}


def main(config: Config, *, dry_run: bool = False, resume: Run | None = None) -> Path | None:
    """Train and report; returns the run's folder, or None after a dry run."""
    from .data import check_data

    trainer, data = loop.prepare(config, "dpo")
    data, found = check_data(
        data, config, trainer.renderer, loss="dpo", longest=loop.model_length(config.model), say=report.say
    )
    report.print_preflight(found)
    if dry_run:
        return None
    probe.try_rows(trainer, detect(), config, found, pairs=True)
    return loop.finish(train(config, trainer, data, resume=resume))


def train(config: Config, trainer: Any, data: Data, *, resume: Run | None = None) -> loop.Session:
    """The loop: -log sigmoid(beta ((log pi/ref)(chosen) - (log pi/ref)(rejected))), averaged over the pairs of a batch."""

    def evaluate() -> dict[str, float]:
        loss = trainer.forward(data.held_out, loss_fn="dpo", **config.options())
        return {"eval_loss": float(loss), "eval_accuracy": loss.metrics["accuracy"]}

    order = loop.order_of(config, data)
    shown = ("loss", "accuracy")
    with loop.Session(
        config, trainer, order, data, loss="dpo", resume=resume, evaluate=evaluate, headline=shown
    ) as session:
        for pairs in session:
            loss = trainer.forward_backward(pairs, loss_fn="dpo", **config.options())
            step = trainer.optim_step(session.adam)
            session.log(loss, step)
    return session


if __name__ == "__main__":
    from .command import start

    sys.exit(start("dpo"))

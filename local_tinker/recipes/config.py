"""The fields every recipe shares, and what flags, files, `--help` and the documentation read from them. No pydantic here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Schedule = Literal["constant", "linear", "cosine"]
Quantize = Literal["4bit", "8bit", "none"]
Overlong = Literal["drop", "truncate_prompt", "error"]
Dtype = Literal["bfloat16", "float32", "float64"]
Compute = Literal["fp8"] | None


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    aliases: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its help line, the names other tools give it, and its range (least <= value, above < value < below)."""
    limits = {"ge": least, "gt": above, "lt": below}
    meta = {"help": help, "aliases": aliases, "limits": {k: v for k, v in limits.items() if v is not None}}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every recipe takes; a recipe's `Config` adds its own fields."""

    model: str = option(
        help="Hub id, folder or catalogue alias (see `local-tinker models`).",
        aliases=("model_name_or_path", "base_model", "model_name"),
    )
    dataset: str = option(
        help="File, glob, folder, hub id (org/name#train[:1000]) or built-in task.",
        aliases=("dataset_name", "dataset_path", "data", "train_file"),
    )
    columns: str | None = option(None, "Your columns under our names: prompt=question,answer=reply.")
    name: str | None = option(None, "Name of the run's folder; default: loss and model.", aliases=("run_name",))

    rank: int = option(32, "Rank of the adapter.", aliases=("lora_r", "lora_rank", "r"), least=1)
    alpha: float = option(32.0, "The update is alpha / rank * B A.", aliases=("lora_alpha",), above=0)
    quantize: Quantize = option("4bit", "How the frozen base is held.")
    target_modules: str = option(
        "all-linear", "Modules that get an adapter: all-linear, or names with commas.", aliases=("lora_target_modules",)
    )
    dtype: Dtype | None = option(
        None, "Compute type; default: bfloat16 where the hardware has it.", aliases=("torch_dtype",)
    )
    seed: int = option(42, "Seed of the adapter, the data order and the sampling.", least=0, below=2**63)
    deterministic: bool = option(False, "On a GPU: kernels whose results repeat bit for bit, at some cost in speed.")

    batch_size: int = option(
        16,
        "Rows a step: the effective size, cut to fit memory.",
        aliases=("train_batch_size", "global_batch_size"),
        least=1,
    )
    epochs: int = option(1, "Passes over the data.", aliases=("num_train_epochs", "num_epochs"), least=1)
    max_steps: int | None = option(
        None, "Steps in all, fewer or more than the epochs have: the data come round again.", least=1
    )
    learning_rate: float = option(1e-4, "Peak learning rate.", aliases=("lr",), above=0)
    schedule: Schedule = option(
        "constant", "Course of the learning rate.", aliases=("lr_schedule", "lr_scheduler_type", "lr_scheduler")
    )
    warmup: float = option(
        0.0,
        "Steps in which the learning rate rises; below 1: a share of all.",
        aliases=("warmup_steps", "warmup_ratio"),
        least=0,
    )
    weight_decay: float = option(0.0, "AdamW's decay.", least=0)
    grad_clip_norm: float = option(
        1.0, "Norm the gradient is clipped to; 0 for no clipping.", aliases=("max_grad_norm",), least=0
    )
    micro_batch_tokens: int | None = option(
        None, "Tokens computed at a time; default: from the memory plan.", aliases=("micro_batch_size",), least=1
    )

    compute: Compute = option(
        None, "fp8: the frozen base multiplies in 8-bit floats, faster and approximate (RTX 40, H100 and newer)."
    )

    max_length: int | None = option(
        None,
        "Longest row in tokens; default: the model's context.",
        aliases=("max_seq_length", "max_seq_len", "cutoff_len"),
        least=2,
    )
    overlong: Overlong = option("drop", "What happens to longer rows (an answer is never cut).")
    limit: int | None = option(
        None, "Use at most so many rows; -1 for all.", aliases=("max_samples", "max_train_samples"), least=-1
    )
    max_bad: int = option(0, "Unusable rows that may be skipped.", least=0)

    eval_fraction: float = option(
        0.0,
        "Share of the rows held out for evaluation.",
        aliases=("test_size", "val_size", "val_set_size"),
        least=0,
        below=1,
    )
    eval_dataset: str | None = option(None, "Rows to evaluate on instead.", aliases=("eval_file", "validation_file"))
    eval_every: int | None = option(
        None, "Steps between evaluations; default: at the ends.", aliases=("eval_steps",), least=1
    )
    samples: int = option(3, "Prompts of the data answered at the end.", least=0)

    save_every: int | None = option(None, "Steps between checkpoints.", aliases=("save_steps",), least=1)
    save_minutes: float | None = option(
        10.0, "Minutes between checkpoints, whatever the steps; none for never.", above=0
    )
    keep_last: int = option(
        2, "Checkpoints kept, besides the one that evaluated best.", aliases=("save_total_limit",), least=1
    )
    output_dir: str = option("runs", "Folder of the runs.", aliases=("output",))
    report_to: str = option("none", "none, tensorboard, wandb or trackio; several with commas.")

    def client(self) -> dict[str, Any]:
        """Arguments of `create_lora_training_client`."""
        targets = self.target_modules
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "quantize": None if self.quantize == "none" else self.quantize,
            "target_modules": targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
            "seed": self.seed,
            "dtype": self.dtype,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "micro_batch_tokens": self.micro_batch_tokens,
            "compute": self.compute,
        }

    def learning_rate_at(self, step: int, total: int) -> float:
        """Learning rate of step 0 .. total - 1: never 0, so that no step is wasted."""
        warmup = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(total - warmup, 1)
        shares = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.learning_rate * shares[self.schedule]


@dataclass(frozen=True)
class Option:
    """A field as its readers see it.

    Attributes:
        kind: bool, int, float or str. choices: allowed words, or ().
        optional: whether none is allowed. own: declared by the recipe, not by `Common`.
    """

    name: str
    type: Any
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    aliases: tuple[str, ...]
    limits: Mapping[str, float]
    own: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    def wants(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (", or none" if self.optional else "")
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]
        signs = {"ge": ">=", "gt": ">", "lt": "<"}
        limits = " and ".join(f"{signs[key]} {value:g}" for key, value in self.limits.items())
        return f"{words} {limits}".rstrip() + (", or none" if self.optional else "")


def options(config: type) -> dict[str, Option]:
    """Name -> option of a Config class, the recipe's own first."""
    hints, common = typing.get_type_hints(config), {f.name for f in dataclasses.fields(Common)}
    found = []
    for field in dataclasses.fields(config):
        parts = [hints[field.name]]
        if isinstance(parts[0], types.UnionType) or typing.get_origin(parts[0]) is typing.Union:
            parts = list(typing.get_args(parts[0]))
        optional = type(None) in parts
        (inner,) = [part for part in parts if part is not type(None)]
        choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
        # `own` fields and those whose default a recipe changes both come from the recipe's class
        meta = field.metadata
        own = field.name not in common
        kind = str if choices else inner
        found.append(
            Option(
                field.name,
                hints[field.name],
                kind,
                choices,
                optional,
                field.default,
                meta["help"],
                meta["aliases"],
                meta["limits"],
                own,
            )
        )
    return {each.name: each for each in sorted(found, key=lambda each: not each.own)}


def resolved(config: Common, loss: str) -> dict[str, Any]:
    """Every value as plain JSON and YAML, `loss` first: what a run's folder keeps and `run --config` reads again."""
    return {"loss": loss, **dataclasses.asdict(config)}


def run_name(config: Common, loss: str) -> str:
    """The config's name, or loss and model as one plain path component."""
    return config.name or re.sub(r"[^A-Za-z0-9._-]+", "-", f"{loss}-{Path(config.model).name}").strip(".-")[:80]


def nearest(word: str, names: Iterable[str]) -> str:
    """`, did you mean x?` or nothing."""
    close = difflib.get_close_matches(word, list(names), n=1)
    return f", did you mean {close[0]}?" if close else ""


def help_lines(config: type, *, own: bool, width: int = 80) -> list[str]:
    """The flags of a Config, two columns."""
    lines = []
    for each in options(config).values():
        if each.own is not own:
            continue
        value = (
            "" if each.kind is bool else " " + ("|".join(each.choices) if each.choices else each.kind.__name__.upper())
        )
        default = "" if each.default in (None, dataclasses.MISSING) else f" [{each.default}]"
        head, text = f"  {each.flag}{value}", each.help + default + (" (needed)" if each.required else "")
        body = textwrap.wrap(text, width - 30)
        if len(head) > 28:
            lines.append(head)
            head = ""
        lines += [f"{(head if i == 0 else ''):<30}{line}" for i, line in enumerate(body)]
    return lines

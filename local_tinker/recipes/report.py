"""What a run prints: config, plan and preflight on stdout, progress on stderr."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..engine.footprint import GIB, TrainSettings
from ..engine.memory import Plan, plan_training
from ..hardware import Hardware
from ..model.dims import ModelDims

_LINES = 60  # plain progress lines a run


def width() -> int:
    import shutil

    return shutil.get_terminal_size((80, 24)).columns


def say(line: str) -> None:
    """Progress and advice. A terminal that is gone must not stop what it would have shown."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def print_config(values: Mapping[str, Any]) -> None:
    print("config")
    longest = max(map(len, values))
    for key, value in values.items():
        print(f"  {key:<{longest}}  {'none' if value is None else value}")
    sys.stdout.flush()


def gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def plan_for(config: Any, dims: ModelDims, hardware: Hardware, *, free_bytes: int | None = None) -> Plan:
    """The memory plan of a config before anything is loaded."""
    compute = {"float64": 8, "float32": 4, "bfloat16": 2, None: 2 if hardware.bf16 else 4}[config.dtype]
    settings = TrainSettings(
        kind=hardware.kind,
        rank=config.rank,
        quantize=config.quantize,
        tokens=config.micro_batch_tokens,
        compute_bytes=compute,
        fp8=config.compute == "fp8",
    )
    return plan_training(dims, settings, hardware.free_bytes if free_bytes is None else free_bytes)


def plan_lines(plan: Plan, free_bytes: int) -> list[str]:
    """The plan in short, for a run."""
    fits = "fits" if plan.fits else "DOES NOT FIT"
    largest = sorted(plan.parts.items(), key=lambda item: -item[1])[:3]
    lines = [
        f"memory plan: {gib(plan.total)} at the peak, {gib(free_bytes)} free: {fits}",
        f"  choice: {plan.words}",
        f"  most of it: {', '.join(f'{name} {gib(size)}' for name, size in largest)}",
    ]
    if not plan.fits:
        lines += [f"  to need less: {lever.change} (saves {gib(lever.saves)})" for lever in plan.levers]
    return lines


def print_lines(lines: Sequence[str]) -> None:
    """Lines on stdout, wrapped between words where a terminal is narrow."""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        print(
            "\n".join(
                textwrap.wrap(
                    line, max(width() - 1, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
                )
            )
            or ""
        )
    sys.stdout.flush()


def print_preflight(report: Any) -> None:
    """The figures and one example; trained tokens coloured where colour is shown."""
    from rich.console import Console

    from ..data.preflight import render

    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        console.print(render(report))
    else:
        print("\n".join(report.lines()))
    sys.stdout.flush()


def print_answers(asked: Sequence[tuple[Any, str, str | None]]) -> None:
    """(prompt, answer, expected) triples."""
    for prompt, answer, expected in asked:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"\n> {_short(question)}\n  {_short(answer) or '(nothing)'}")
        if expected is not None:
            print(f"  (data: {_short(str(expected))})")
    sys.stdout.flush()


def _short(text: str, limit: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def used_bytes() -> int:
    """Memory of this process: its peak on the card, or what it holds in RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


class ProgressReport:
    """Loss, speed, time left and memory: a live line on a terminal, plain lines elsewhere (TERM=dumb, pipes, logs)."""

    def __init__(self, total: int, *, done: int = 0, stream: Any = None) -> None:
        from rich.console import Console

        self.total, self.done = total, done
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=21)
        self._every = max(1, -(-total // _LINES))
        self._live = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not os.environ.get("CI"):
            self._live = self._open()

    def _open(self) -> Any:
        from rich.progress import BarColumn, Progress, TextColumn

        live = Progress(
            BarColumn(bar_width=12), TextColumn("{task.fields[line]}"), console=self._console, transient=True
        )
        self._task = live.add_task("train", total=self.total, completed=self.done, line="")
        live.start()
        return live

    def step(self, step: int, numbers: Mapping[str, float], tokens: int) -> float:
        """Show a finished step; returns tokens a second of late."""
        now = time.monotonic()
        self._recent.append((now, tokens))
        started, since = self._recent[0][0], list(self._recent)[1:]
        seconds = max(now - started, 1e-9)
        speed = sum(count for _, count in since) / seconds
        left = (self.total - step) * seconds / len(since)
        line = self.line(step, numbers, speed, left)
        if self._live is not None:
            self._live.update(self._task, completed=step, line=line)
        elif step == self.total or step % self._every == 0 or step == self.done + 1:
            with suppress(OSError):
                print(line, file=self._stream, flush=True)
        return speed

    def line(self, step: int, numbers: Mapping[str, float], speed: float, left: float) -> str:
        """At most 60 columns: what does not fit is left out from the end."""
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        parts += [f"{name} {_number(value)}" for name, value in numbers.items()]
        parts += [f"{speed:,.0f} tok/s", f"{_time(left)} left", f"{used_bytes() / GIB:.1f} GiB"]
        room = min(60, self._console.width) if self._live is None else max(self._console.width - 14, 20)
        while len("  ".join(parts)) > room and len(parts) > 2:
            parts.pop()
        return "  ".join(parts)

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(line, markup=False)
        else:
            with suppress(OSError):
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"


def _time(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02}"
    )

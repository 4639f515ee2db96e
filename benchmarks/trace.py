"""Where a step's device time goes: one step under torch's profiler, its kernels by name and by part.

A kernel belongs to the part that its name says, or the CPU operations it was launched from: those are the intervals that
hold its launch in the profiler's trace.
"""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import work
from .work import Case

PARTS = ("gemm", "attention", "head", "elementwise", "dequantise", "optimiser", "copies")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_DEQUANTISE = re.compile(r"dequant|nf4|kdequantize", re.I)
_ATTENTION = re.compile(r"flash|fmha|attention|varlen", re.I)
_HEAD = re.compile(r"frozenhead|adaptedhead|target_?log_?prob|cross_entropy|softmax|logsumexp|head", re.I)
_GEMM = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|matmul", re.I)
TOP = 40


@dataclass(frozen=True)
class Kernel:
    """One launch on the device: times in microseconds, and the names and input sizes of the operations it came from."""

    name: str
    start: float
    seconds_us: float
    category: str
    callers: tuple[str, ...]
    sizes: frozenset[int]


def profile(run: Callable[[], Any], *, case: Case, device: str, path: Path) -> dict[str, float]:
    """Run one step under the profiler, append the report to `path`, return milliseconds by part."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    found = kernels(events) if device == "cuda" else operations(events)
    vocab = work.MODELS[case.model]["config"]["vocab_size"]
    parts = by_part(found, vocab=vocab)
    with path.open("a", encoding="utf-8") as out:
        out.write(report(case.name, case.model, found, parts, vocab=vocab))
    return parts


def kernels(events: Sequence[dict]) -> list[Kernel]:
    """Device events of a trace, each with the CPU operations that enclose its launch."""
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    enclosing = _Enclosing(e for e in events if e.get("cat") in ("cpu_op", "user_annotation"))
    out = []
    for event in events:
        if event.get("cat") not in DEVICE:
            continue
        launch = launches.get(event["args"].get("correlation"))
        callers = enclosing.of(launch) if launch is not None else []
        out.append(_kernel(event, callers))
    return out


def operations(events: Sequence[dict]) -> list[Kernel]:
    """On a CPU an operation is its own kernel: those that call no other."""
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    enclosing = _Enclosing(e for e in events if e.get("cat") in ("cpu_op", "user_annotation"))
    callers = {id(e): enclosing.of(e) for e in ops}
    parents = {id(chain[-1]) for e in ops for chain in [[c for c in callers[id(e)] if c is not e]] if chain}
    return [_kernel(e, [c for c in callers[id(e)] if c is not e]) for e in ops if id(e) not in parents]


def _kernel(event: dict, callers: Iterable[dict]) -> Kernel:
    callers = list(callers)
    shapes = [e.get("args", {}).get("Input Dims", []) for e in (*callers, event)]
    return Kernel(
        name=event["name"],
        start=float(event["ts"]),
        seconds_us=float(event.get("dur", 0.0)),
        category=event["cat"],
        callers=tuple(e["name"] for e in callers),
        sizes=frozenset(_numbers(shapes)),
    )


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)


class _Enclosing:
    """Which intervals of a thread hold a moment, outermost first."""

    def __init__(self, events: Iterable[dict]) -> None:
        self._threads: dict[Any, list[dict]] = defaultdict(list)
        for event in events:
            self._threads[event["tid"]].append(event)
        for thread in self._threads.values():
            thread.sort(key=lambda e: (float(e["ts"]), -float(e.get("dur", 0.0))))
        self._parents = {tid: _parents(thread) for tid, thread in self._threads.items()}
        self._starts = {tid: [float(e["ts"]) for e in thread] for tid, thread in self._threads.items()}

    def of(self, event: dict) -> list[dict]:
        thread, moment = self._threads.get(event["tid"], []), float(event["ts"])
        at = bisect_right(self._starts.get(event["tid"], []), moment) - 1
        chain = []
        while at >= 0:
            held = thread[at]
            if float(held["ts"]) + float(held.get("dur", 0.0)) >= moment:
                chain.append(held)
            at = self._parents[event["tid"]][at]
        return chain[::-1]


def _parents(thread: Sequence[dict]) -> list[int]:
    """Index of the interval around each one, -1 for none; intervals of one thread nest."""
    out: list[int] = []
    open_: list[int] = []
    for i, event in enumerate(thread):
        while open_ and _end(thread[open_[-1]]) <= float(event["ts"]):
            open_.pop()
        out.append(open_[-1] if open_ else -1)
        open_.append(i)
    return out


def _end(event: dict) -> float:
    return float(event["ts"]) + float(event.get("dur", 0.0))


def part(kernel: Kernel, *, vocab: int) -> str:
    """Names decide before callers do, since a dequantisation may be launched from anywhere."""
    if "optim_step" in kernel.callers:
        return "optimiser"
    if _DEQUANTISE.search(kernel.name) or any(_DEQUANTISE.search(name) for name in kernel.callers):
        return "dequantise"
    if _ATTENTION.search(kernel.name) or any(_ATTENTION.search(name) for name in kernel.callers):
        return "attention"
    if vocab in kernel.sizes or _HEAD.search(kernel.name) or any(_HEAD.search(name) for name in kernel.callers):
        return "head"
    if kernel.category in ("gpu_memcpy", "gpu_memset"):
        return "copies"
    if _GEMM.search(kernel.name) or any(name in ("aten::mm", "aten::addmm", "aten::bmm") for name in kernel.callers):
        return "gemm"
    return "elementwise" if kernel.name not in ("aten::mm", "aten::addmm", "aten::bmm") else "gemm"


def by_part(found: Sequence[Kernel], *, vocab: int) -> dict[str, float]:
    """Milliseconds of each part, of the device's busy and idle time between the first launch and the last."""
    out = dict.fromkeys(PARTS, 0.0)
    for kernel in found:
        out[part(kernel, vocab=vocab)] += kernel.seconds_us / 1e3
    busy, last = 0.0, float("-inf")
    for kernel in sorted(found, key=lambda k: k.start):
        end = kernel.start + kernel.seconds_us
        busy += max(0.0, end - max(kernel.start, last))
        last = max(last, end)
    span = last - min((k.start for k in found), default=last)
    return {
        name: round(value, 3) for name, value in (out | {"host_gap": (span - busy) / 1e3, "span": span / 1e3}).items()
    }


def report(name: str, model: str, found: Sequence[Kernel], parts: dict[str, float], *, vocab: int) -> str:
    """A part-by-part line and the kernels that take the most time, with how often they ran."""
    span = parts["span"] or 1.0
    line = "  ".join(f"{key} {value:.2f} ({value / span:.0%})" for key, value in parts.items() if key != "span")
    table: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in found:
        table[part(kernel, vocab=vocab), kernel.name].append(kernel.seconds_us)
    rows = sorted(table.items(), key=lambda row: -sum(row[1]))
    out = [f"== {name}, {model}: one step of {span:.2f} ms, {len(found)} launches", line, ""]
    out.append(f"{'ms':>9} {'share':>6} {'count':>6} {'mean us':>9}  part         kernel")
    for (where, kernel), times in rows[:TOP]:
        total = sum(times) / 1e3
        out.append(
            f"{total:9.3f} {total / span:6.1%} {len(times):6d} {sum(times) / len(times):9.1f}  {where:<12} {kernel[:150]}"
        )
    return "\n".join(out) + "\n\n"

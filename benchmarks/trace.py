"""Where a step's device time goes: one step under torch's profiler, its kernels by name and by part.

A kernel of ours belongs to the module of `local_tinker.model.kernels` that defines it. Others belong to what their name
says, or the CPU operations they were launched from: those are the intervals that hold their launch in the profiler's trace.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
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
ROOMS = {"nf4": "dequantise"}  # modules of kernels whose part has another name
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_DEQUANTISE = re.compile(r"dequant|nf4", re.I)
_ATTENTION = re.compile(r"flash|fmha|attention|varlen", re.I)
_HEAD = re.compile(r"frozenhead|adaptedhead|logprob|cross_?entropy|softmax|logsumexp", re.I)
_GEMM = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|matmul", re.I)
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::_scaled_mm": 0}  # where the two matrices stand
TOP = 40


@dataclass(frozen=True)
class Kernel:
    """One launch on the device, in microseconds, and the operations it came from.

    Attributes:
        callers: names of the operations around the launch, outermost first. sizes: every dimension of their inputs.
        product: (M, K, N) of the matrix product it computes, where it is one of torch's.
    """

    name: str
    start: float
    duration: float
    category: str
    callers: tuple[str, ...]
    sizes: frozenset[int]
    product: tuple[int, int, int] | None


def profile(run: Callable[[], Any], *, case: Case, device: str, path: Path, step_ms: float) -> dict[str, float]:
    """Run one step under the profiler, append the report to `path`, return milliseconds by part.

    Args:
        step_ms: of a step without the profiler, which slows the host down.
    """
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
    own = own_kernels()
    parts = by_part(found, vocab=vocab, own=own)
    with path.open("a", encoding="utf-8") as out:
        title = f"{case.name}, {case.model}: a step takes {step_ms:.2f} ms without the profiler"
        out.write(report(title, found, parts, vocab=vocab, own=own, host=host_times(events)))
    return parts


def own_kernels() -> dict[str, str]:
    """Our Triton kernels: name -> the part that the module defining it is for."""
    from local_tinker.model import kernels as rooms

    out = {}
    for found in pkgutil.iter_modules(rooms.__path__):
        module = importlib.import_module(f"{rooms.__name__}.{found.name}")
        for name, value in vars(module).items():
            # a kernel is an object of triton's around the function written here
            if hasattr(value, "fn") and getattr(value, "__module__", None) == module.__name__:
                out[name] = ROOMS.get(found.name, found.name)
    return out


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
        duration=float(event.get("dur", 0.0)),
        category=event["cat"],
        callers=tuple(e["name"] for e in callers),
        sizes=frozenset(_numbers(shapes)),
        product=_product([*callers, event]),
    )


def _product(chain: Sequence[dict]) -> tuple[int, int, int] | None:
    """Dimensions of the innermost matrix product of a chain of operations."""
    for event in reversed(chain):
        if event["name"] in _PRODUCTS:
            matrices = event.get("args", {}).get("Input Dims", [])[_PRODUCTS[event["name"]] :][:2]
            if [len(dims) >= 2 for dims in matrices] == [True, True]:
                (*_, rows, inner), (*_, columns) = matrices
                return rows, inner, columns
    return None


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


def part(kernel: Kernel, *, vocab: int, own: dict[str, str]) -> str:
    """Names decide before callers do, since a dequantisation may be launched from anywhere."""
    names = (kernel.name, *kernel.callers)
    if "optim_step" in kernel.callers:
        return "optimiser"
    if kernel.name in own:
        return own[kernel.name]
    for where, pattern in (("dequantise", _DEQUANTISE), ("attention", _ATTENTION)):
        if any(pattern.search(name) for name in names):
            return where
    if any(_HEAD.search(name) for name in names) or (vocab in kernel.sizes and "aten::embedding" not in names):
        return "head"
    if kernel.category in ("gpu_memcpy", "gpu_memset"):
        return "copies"
    return "gemm" if kernel.product is not None or _GEMM.search(kernel.name) else "elementwise"


def by_part(found: Sequence[Kernel], *, vocab: int, own: dict[str, str]) -> dict[str, float]:
    """Milliseconds of each part, of the device's busy and idle time between the first launch and the last."""
    out = defaultdict(float, dict.fromkeys(PARTS, 0.0))
    for kernel in found:
        out[part(kernel, vocab=vocab, own=own)] += kernel.duration / 1e3
    busy, last = 0.0, float("-inf")
    for kernel in sorted(found, key=lambda k: k.start):
        end = kernel.start + kernel.duration
        busy += max(0.0, end - max(kernel.start, last))
        last = max(last, end)
    span = last - min((k.start for k in found), default=last)
    return {
        name: round(value, 3) for name, value in (out | {"host_gap": (span - busy) / 1e3, "span": span / 1e3}).items()
    }


def host_times(events: Sequence[dict]) -> dict[str, float]:
    """Milliseconds that the calls took on the host, by name, under the profiler."""
    out: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in ("forward_backward", "optim_step"):
            out[event["name"]] += float(event.get("dur", 0.0)) / 1e3
    return dict(out)


def report(
    title: str,
    found: Sequence[Kernel],
    parts: dict[str, float],
    *,
    vocab: int,
    own: dict[str, str],
    host: dict[str, float],
) -> str:
    """Milliseconds by part, then the kernels that take the most time: how often, and at what matrix rate."""
    span = parts["span"] or 1.0
    line = "  ".join(f"{key} {value:.2f} ({value / span:.0%})" for key, value in parts.items() if key != "span")
    table: dict[tuple[str, str, tuple | None], list[float]] = defaultdict(list)
    for kernel in found:
        table[part(kernel, vocab=vocab, own=own), kernel.name, kernel.product].append(kernel.duration)
    out = [f"== {title}", f"device, {span:.2f} ms with it, {len(found)} launches: {line}"]
    out.append("host: " + "  ".join(f"{name} {value:.2f}" for name, value in host.items()) + " ms")
    out.append(
        f"{'ms':>9} {'share':>6} {'count':>6} {'mean us':>9} {'TFLOP/s':>8}  part         kernel, product M x K x N"
    )
    for (where, name, product), times in sorted(table.items(), key=lambda row: -sum(row[1]))[:TOP]:
        total = sum(times)
        rate, shape = "", ""
        if product is not None:
            rate = f"{2 * product[0] * product[1] * product[2] * len(times) / max(total, 1e-3) / 1e6:.0f}"
            shape = "  " + " x ".join(map(str, product))
        out.append(
            f"{total / 1e3:9.3f} {total / 1e3 / span:6.1%} {len(times):6d} {total / len(times):9.1f} {rate:>8}  "
            f"{where:<12} {name[:120]}{shape}"
        )
    return "\n".join(out) + "\n\n"

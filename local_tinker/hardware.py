"""What this machine has, asked of the driver and the kernel: never through torch, which takes seconds to import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The device that training would use.

    Args:
        kind: "cuda" or "cpu".
        total_bytes, free_bytes: of the card, or of the memory this process may use.
        capability: CUDA compute capability such as (8, 9); None on a CPU.
        bf16: the hardware multiplies bfloat16.
        driver: NVIDIA driver version.
        count: visible cards.
        note: why there is no card, or what could not be asked.
    """

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None
    bf16: bool = False
    driver: str | None = None
    count: int = 0
    note: str | None = None


def fp8_fault(capability: tuple[int, int] | None) -> str | None:
    """Why a card of this compute capability multiplies no 8-bit floats, in words for the user; None where it does. A CPU
    (None) computes the same in fp32, for trying things out."""
    if capability is not None and capability < (8, 9):
        return "the card is older than compute capability 8.9 (RTX 40 and H100 have it)"
    return None


def detect(kind: str | None = None) -> Hardware:
    """The first visible NVIDIA card, otherwise the CPU with the reason in `note`; with kind="cpu" the CPU in any case."""
    card, why = (None, "the CPU was asked for") if kind == "cpu" else _cuda()
    return card if card is not None else _cpu(why)


def memory(*, root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) bytes of memory for this process: the machine's, cut to the container's limit."""
    total, available = _meminfo(root / "proc/meminfo")
    for limit, used in _cgroup_limits(root / "sys/fs/cgroup", root / "proc/self/cgroup"):
        if limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return total, min(available, total)


def _cuda() -> tuple[Hardware | None, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None, f"CUDA_VISIBLE_DEVICES={visible!r} hides every card"
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is missing, so cards cannot be seen: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"no NVIDIA driver answers ({error})"
    try:
        return _first_card(pynvml, visible)
    except pynvml.NVMLError as error:
        return None, f"the NVIDIA driver refuses to describe its cards ({error})"
    finally:
        pynvml.nvmlShutdown()


def _first_card(nvml, visible: str | None) -> tuple[Hardware | None, str]:
    count = nvml.nvmlDeviceGetCount()
    if count == 0:
        return None, "the NVIDIA driver lists no card"
    names = [n.strip() for n in visible.split(",") if n.strip()] if visible is not None else ["0"]
    first = names[0]
    if first.isdigit():
        if int(first) >= count:
            return None, f"CUDA_VISIBLE_DEVICES={visible!r} names card {first}, the driver lists {count}"
        handle = nvml.nvmlDeviceGetHandleByIndex(int(first))
    else:
        handle = nvml.nvmlDeviceGetHandleByUUID(first)
    memory_info = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    card = Hardware(
        kind="cuda",
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory_info.total),
        free_bytes=int(memory_info.free),
        capability=capability,
        bf16=capability >= (8, 0),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        count=len(names) if visible is not None else count,
    )
    return card, ""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu(why: str) -> Hardware:
    total, available = memory()
    name, flags = _cpuinfo(Path("/proc/cpuinfo"))
    bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    return Hardware(kind="cpu", name=name, total_bytes=total, free_bytes=available, bf16=bf16, note=why)


def _cpuinfo(path: Path) -> tuple[str, set[str]]:
    import platform

    name, flags = platform.processor() or platform.machine() or "CPU", set()
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key == "model name":
            name = value.strip()
        elif key in ("flags", "features"):
            flags = set(value.split())
        if not line.strip() and flags:
            break
    return name, flags


def _meminfo(path: Path) -> tuple[int, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return _memory_without_proc()
    kib = {}
    for line in lines:
        key, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            kib[key] = int(value.split()[0]) * 1024
    return kib["MemTotal"], kib.get("MemAvailable", kib.get("MemFree", 0))


def _memory_without_proc() -> tuple[int, int]:
    """macOS and Windows."""
    import psutil

    info = psutil.virtual_memory()
    return int(info.total), int(info.available)


def _cgroup_limits(mount: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, used) of every control group above this process that caps memory; cgroup v2 and v1."""
    folders = {mount, mount / "memory"}
    try:
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = mount if controllers == "" else mount / "memory"
            if controllers == "" or "memory" in controllers.split(","):
                here = base / path.lstrip("/")
                folders |= {p for p in (here, *here.parents) if p.is_relative_to(base)}
    except (OSError, ValueError):
        pass
    found = []
    for folder in sorted(folders):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _number(folder / limit_name)
            # v1 writes a huge number, near 2**63, for "no limit"
            if limit is not None and limit < 2**60:
                cache = _reclaimable(folder / "memory.stat")
                found.append((limit, max(0, (_number(folder / used_name) or 0) - cache)))
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Page cache counted as used by the group, which the kernel gives back when asked."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    value = stat.get("inactive_file", stat.get("total_inactive_file", "0"))
    return int(value) if value.isdigit() else 0

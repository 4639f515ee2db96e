"""`local-tinker doctor`: is this machine ready, and if not, the command that makes it so."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..hardware import Hardware, detect
from ..model import fetch, from_wheel
from . import output

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
_LEAST = {
    "transformers": (5, 17),
    "peft": (0, 18),
    "safetensors": (0, 4),
    "huggingface_hub": (1, 0),
    "tokenizers": (0, 20),
}
_LITTLE_DISK = 10 * 2**30
_REINSTALL_TORCH = "uv pip install --reinstall torch --torch-backend=auto"


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "warn" (works, with a limit) or "fail" (training cannot start); `fix` is what to run."""

    name: str
    state: str
    detail: str
    fix: str | None = None


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Check GPU, drivers, libraries and caches, and say how to fix what is wrong.

    Ends with code 3 when something that training needs is broken. Contacts nobody.
    """
    hardware = detect()
    checks = run_checks(hardware)
    failed = any(check.state == "fail" for check in checks)
    if json:
        output.as_json({"ok": not failed, "hardware": asdict(hardware), "checks": [asdict(c) for c in checks]})
    else:
        print(report(checks))
    return 3 if failed else 0


def run_checks(hardware: Hardware) -> list[Check]:
    torch = check_torch_import(hardware)
    return [
        Check("python", "ok", f"{sys.version.split()[0]} at {sys.executable}"),
        check_hardware(hardware),
        torch,
        *(check_package(name, least) for name, least in _LEAST.items()),
        check_quantizer(hardware, usable_torch=torch.state != "fail"),
        *check_caches(),
        check_hub(),
    ]


def report(checks: list[Check]) -> str:
    """The findings as indented lines, which stay readable however narrow the terminal is."""
    lines = []
    for check in checks:
        mark = output.paint(f"{check.state:<4}", _STYLES[check.state], sys.stdout)
        lines.append(f"{mark}  {check.name}: {check.detail}")
        if check.fix:
            lines.append(f"      fix: {check.fix}")
    failed = [check.name for check in checks if check.state == "fail"]
    lines += ["", f"Not ready: {', '.join(failed)}." if failed else "Ready."]
    return "\n".join(lines)


def check_hardware(hardware: Hardware) -> Check:
    memory = f"{output.gib(hardware.free_bytes)} of {output.gib(hardware.total_bytes)} free"
    if hardware.kind == "cpu":
        detail = f"no GPU ({hardware.note}); the CPU will be used: {hardware.name}, {memory}"
        return Check("gpu", "warn", detail, "none is needed for smollm2-135m; for a card, install the NVIDIA driver")
    major, minor = hardware.capability
    detail = f"{hardware.name}, {memory}, compute {major}.{minor}, driver {hardware.driver}"
    if not hardware.bf16:
        return Check("gpu", "warn", f"{detail}; it has no bfloat16, so fp32 is used: slower, twice the memory")
    if hardware.free_bytes < 0.7 * hardware.total_bytes:
        return Check(
            "gpu", "warn", f"{detail}; another program holds memory on it", "see `nvidia-smi`, end that program"
        )
    return Check("gpu", "ok", detail)


def check_torch_import(hardware: Hardware) -> Check:
    try:
        import torch
    except Exception as error:  # a broken build raises OSError or worse while loading its libraries
        return Check("torch", "fail", f"cannot be imported ({_first_line(error)})", _REINSTALL_TORCH)
    return check_torch(hardware, torch)


def check_torch(hardware: Hardware, torch: Any) -> Check:
    """Whether this build of torch can drive this card."""
    built = torch.version.cuda
    detail = f"{torch.__version__}, built for {'CUDA ' + built if built else 'CPU'}"
    if hardware.kind == "cpu":
        return Check("torch", "ok", detail)
    if not built:
        return Check("torch", "fail", f"{detail}, which cannot use {hardware.name}", _REINSTALL_TORCH)
    if not torch.cuda.is_available():
        why = f"{detail}, but CUDA does not start: driver {hardware.driver} is older than that build needs"
        return Check("torch", "fail", why, f"update the NVIDIA driver, or {_REINSTALL_TORCH}")
    built_for = torch.cuda.get_arch_list()
    if not runs_on(built_for, hardware.capability):
        major, minor = hardware.capability
        why = f"{detail} for {' '.join(built_for)}, without sm_{major}{minor} of {hardware.name}"
        return Check("torch", "fail", why, _REINSTALL_TORCH)
    return Check("torch", "ok", detail)


def runs_on(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Binary code (sm_) runs on the same major version from its minor on; PTX (compute_) on anything newer."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def check_package(name: str, least: tuple[int, int]) -> Check:
    from importlib import metadata  # here and below: not at import, which `--help` waits for

    wanted = ".".join(map(str, least))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "is not installed", f'pip install "{name}>={wanted}"')
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < least:
        return Check(name, "fail", f"{version} is too old", f'pip install --upgrade "{name}>={wanted}"')
    return Check(name, "ok", version)


def check_quantizer(hardware: Hardware, *, usable_torch: bool) -> Check:
    """Really quantises a small tensor to NF4 on the device and looks at what comes back.

    In a process of its own: a mismatched native library can crash, and on some CPUs the import looks for a kernel on
    the hub, which offline mode prevents.
    """
    import subprocess
    from importlib import metadata

    name = "bitsandbytes"
    instead = 'pip install --upgrade bitsandbytes; until then quantize="none"'
    if not usable_torch:
        return Check(name, "fail", "cannot be tried without torch", "fix torch first")
    device = "cuda" if hardware.kind == "cuda" else "cpu"
    script = f"from {__name__} import nf4_error; print(nf4_error({device!r}))"
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
        return Check(name, "fail", f"4-bit quantisation does not work ({said})", instead)
    error = float(done.stdout.split()[-1])
    if not error < 0.2:
        return Check(name, "fail", f"NF4 comes back wrong (error {error:.2g} of the largest weight)", instead)
    return Check(name, "ok", f"{metadata.version(name)}, NF4 tried on the {device}")


def nf4_error(device: str) -> float:
    """Largest error of a quantised and restored tensor over its largest value; NF4's widest half-gap is 0.15."""
    import torch
    from bitsandbytes import functional

    weight = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return float((functional.dequantize_4bit(packed, state) - weight).abs().max())


def check_caches() -> list[Check]:
    checks = []
    for name, folder in (("hub cache", fetch.hub_cache()), ("own cache", from_wheel.cache_root())):
        exists = _existing(folder)
        free = shutil.disk_usage(exists).free
        detail = f"{folder}: {_contents(name, folder)}; {output.gib(free)} free on its disk"
        if not os.access(exists, os.W_OK):
            fix = f"make it writable, or set {'HF_HOME' if name == 'hub cache' else 'LOCAL_TINKER_CACHE'}"
            checks.append(Check(name, "warn", f"{detail}; it cannot be written", fix))
        elif free < _LITTLE_DISK:
            fix = "free some space (`hf cache ls`), or set HF_HOME to a larger disk"
            checks.append(Check(name, "warn", f"{detail}; larger models will not fit", fix))
        else:
            checks.append(Check(name, "ok", detail))
    return checks


def _contents(name: str, folder: Path) -> str:
    if name == "hub cache":
        repos = sorted(p.name.removeprefix("models--").replace("--", "/") for p in folder.glob("models--*"))
        models = [repo for repo in repos if fetch.cached_snapshot(repo)]
        part = f", {len(repos) - len(models)} incomplete" if len(repos) > len(models) else ""
    else:
        models, part = sorted(p.name for p in folder.glob("models/*") if p.is_dir() and p.name[0] != "."), ""
    shown = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    return (f"{len(models)} models ({shown})" if models else "no models yet") + part


def check_hub(*, stored_token: Callable[[], bool] | None = None) -> Check:
    """What the environment says about reaching the hub; nothing is sent."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = (stored_token or _stored_token)()
    has = "a token is set" if token else "no token, which only gated models need (`hf auth login`)"
    forbidden = fetch.offline()
    if forbidden:
        detail = f"{forbidden}: only models on this disk can be used"
        return Check("hub", "warn", detail, f"unset {forbidden.split('=')[0]} to allow downloads")
    return Check("hub", "ok", f"downloads allowed from {endpoint}; {has}")


def _stored_token() -> bool:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    path = os.environ.get("HF_TOKEN_PATH")
    home = os.environ.get("HF_HOME") or str(fetch.hub_cache().parent)
    return Path(path or os.path.join(home, "token")).expanduser().is_file()


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

"""The Hugging Face cache and hub: find a complete snapshot, download one, say why the hub refuses.

The environment is read when asked (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN); huggingface_hub is
imported only to download.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import ModelError

ALLOW = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*")
# consolidated*: the same weights a second time in the vendor's own layout.
IGNORE = ("consolidated*", "original/*", "onnx/*", "openvino/*", "runs/*", "*.bin", "*.py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_TRUE = {"1", "ON", "YES", "TRUE"}


class HubUnavailable(Exception):
    """The hub may not or cannot be asked; says which."""


def hub_cache() -> Path:
    """Where huggingface_hub keeps its snapshots, by the same variables and in the same order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(base)).expanduser() / "huggingface" / "hub"


def offline() -> str | None:
    """The environment variable that forbids asking the hub, as `NAME=value`; None when asking is allowed."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        value = os.environ.get(name, "")
        if value.upper() in _TRUE:
            return f"{name}={value}"
    return None


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a complete snapshot (config, every weight shard, a tokenizer), `main` before older ones."""
    repo = hub_cache() / ("models--" + hub_id.replace("/", "--"))
    snapshots = repo / "snapshots"
    if not snapshots.is_dir():
        return None
    folders = sorted(snapshots.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
    ref = repo / "refs" / "main"
    if ref.is_file():
        main = snapshots / ref.read_text().strip()
        folders = [main, *(f for f in folders if f != main)]
    for folder in folders:
        if (folder / "config.json").is_file() and missing_weights(folder) == [] and has_tokenizer(folder):
            return folder
    return None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def missing_weights(folder: Path) -> list[str]:
    """Names of safetensors files that the folder should hold and does not."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return []
    if not index.is_file():
        return ["model.safetensors"]
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return [index.name]
    return sorted(name for name in shards if not (folder / name).is_file())


def check_weights(folder: Path) -> None:
    """Raises ModelError unless the folder's safetensors weights are all there."""
    missing = missing_weights(folder)
    if not missing:
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if missing == ["model.safetensors"] and others:
        raise ModelError(_only_pickles(str(folder), others))
    raise ModelError(f"{folder} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; copy it again")


def download(hub_id: str, *, gated: bool, twin: str | None, say: Callable[[str], None]) -> Path:
    """Fetch config, safetensors and tokenizer of a hub model into the Hugging Face cache; the snapshot's folder.

    Raises:
        HubUnavailable: offline by choice, or nobody answers.
        ModelError: no such repository, no access, no safetensors, or too little disk.
    """
    forbidden = offline()
    if forbidden:
        raise HubUnavailable(f"{forbidden} forbids asking the Hugging Face hub")
    from huggingface_hub import HfApi, get_token, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        info = api.model_info(hub_id, files_metadata=True, timeout=15)
        # a gated repository shows its card to everyone; this asks for the files
        if gated or getattr(info, "gated", False):
            api.auth_check(hub_id)
        size = check_files(hub_id, {f.rfilename: f.size or 0 for f in info.siblings or []})
        check_disk(hub_id, size)
        say(f"downloading {hub_id} ({size / 2**30:.1f} GiB) into {hub_cache()}")
        folder = snapshot_download(
            hub_id, revision=info.sha, allow_patterns=list(ALLOW), ignore_patterns=list(IGNORE), cache_dir=hub_cache()
        )
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        gated = gated or isinstance(error, GatedRepoError)
        token = get_token() is not None
        refusal = explain_refusal(hub_id, status=status, gated=gated, token=token, twin=twin)
        if refusal is None:
            raise HubUnavailable(f"the hub gave no usable answer ({str(error).splitlines()[0]})") from None
        raise ModelError(refusal) from None
    except HFValidationError as error:
        raise ModelError(f"{hub_id!r} cannot be a hub id: {error}") from None
    except Exception as error:
        if not _connection_trouble(error):
            raise
        raise HubUnavailable(f"the Hugging Face hub does not answer ({type(error).__name__}: {error})") from None
    return Path(folder)


def _connection_trouble(error: Exception) -> bool:
    # the HTTP library under huggingface_hub changed with its major versions, so its errors go by their package
    package = type(error).__module__.split(".")[0]
    return package in ("httpx", "httpx2", "requests", "urllib3") or isinstance(error, (ConnectionError, TimeoutError))


def check_files(hub_id: str, files: dict[str, int]) -> int:
    """Bytes to download of a repository's files; refuses one without safetensors weights."""
    elsewhere = tuple(pattern.rstrip("*") for pattern in IGNORE if pattern.endswith("*"))
    names = [n for n in files if n.endswith(".safetensors") and not n.startswith(elsewhere)]
    if not names:
        others = sorted(n for n in files if n.endswith((".bin", ".pt", ".pth", ".gguf")))
        raise ModelError(_only_pickles(hub_id, others))
    return sum(files[n] for n in names)


def check_disk(hub_id: str, size: int) -> None:
    folder = hub_cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ModelError(
            f"{hub_id} needs {size / 2**30:.1f} GiB on disk and {folder} has {free / 2**30:.1f} GiB free; "
            "free some space, or set HF_HOME to a larger disk"
        )


def explain_refusal(hub_id: str, *, status: int | None, gated: bool, token: bool, twin: str | None) -> str | None:
    """Why the hub said no, and what to do; None when it is the hub's own trouble.

    The hub answers 401 to a token it does not know, 401 without a token both for gated and for missing repositories,
    403 to a token whose owner has not accepted the licence, and 404 to a known token where nothing is visible.
    """
    url = f"https://huggingface.co/{hub_id}"
    copies = f"\nThe same weights without the gate (same licence): {twin}" if twin else ""
    if status == 401 and token:
        return (
            f"the hub does not accept your token (asked for {hub_id}); make a new one at "
            f"https://huggingface.co/settings/tokens and run `hf auth login`, or set HF_TOKEN{copies}"
        )
    if status == 401 and gated:
        return (
            f"{hub_id} is gated and no token is set: accept its licence at {url}, make a token at "
            f"https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN{copies}"
        )
    if status == 403:
        return (
            f"your token may not read {hub_id}: its licence is not accepted yet; accept it at {url} (some are granted "
            f"by hand), and give a fine-grained token the right to read gated repositories{copies}"
        )
    if status in (401, 404):
        private = "" if token else ", or it is private and needs a token (`hf auth login` or HF_TOKEN)"
        return f"the hub has no model {hub_id}{private}; check the name at {url}"
    return None


def _only_pickles(name: str, others: list[str]) -> str:
    holds = f"only {', '.join(others[:3])}" if others else "no weights"
    return (
        f"{name} has no safetensors weights ({holds}); pickled .bin files can run code when opened and are refused. "
        "Choose a repository with .safetensors files, or convert it: https://huggingface.co/spaces/safetensors/convert"
    )

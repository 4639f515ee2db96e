"""Reward functions: how ours and TRL's are called, and ready-made checks.

A helper takes one completion and gives a float, or a group of completions (a list) and gives a list of floats.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ._reward_sandbox import RunResult, extract_code, run_python, unit_tests
from .advantages import check_reward
from .errors import MissingDependencyError, StateError, UsageError

# ---------------------------------------------------------------------------------------------- calling a function


def _is_group(completion: Any) -> bool:
    return isinstance(completion, (list, tuple))


def _over_group(score: Callable[[Any], Any], completion: Any) -> Any:
    return [score(each) for each in completion] if _is_group(completion) else score(completion)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


class Reward:
    """A reward function that takes one completion or a group; made by `reward`."""

    def __init__(self, fn: Callable) -> None:
        if not callable(fn):
            raise UsageError(f"a reward function must be callable, got {type(fn).__name__}")
        self.fn = fn
        self.__name__ = _name(fn)
        try:
            self._parameters = dict(inspect.signature(fn).parameters)
        except (TypeError, ValueError):
            self._parameters = {"completion": inspect.Parameter("completion", inspect.Parameter.POSITIONAL_ONLY)}
        self.batched = "completions" in self._parameters

    def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float | None | list[float | None]:
        """One float for a completion, a list for a group.

        Args:
            prompt: the prompt they continue, a string or messages.
            columns: further columns of the prompt's row, e.g. ``answer="42"``.
        """
        group = list(completion) if _is_group(completion) else [completion]
        each = {name: [value] * len(group) for name, value in columns.items()}
        scores = self.flat([prompt] * len(group), group, each)
        return scores if _is_group(completion) else scores[0]

    def flat(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list:
        """One reward a completion; prompts, completions and columns have equal lengths."""
        if self.batched:
            return self._call_batched(list(prompts), list(completions), columns)
        self.check_columns(columns)
        scores = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                score = self._call_one(prompt, completion, {name: values[i] for name, values in columns.items()})
            except Exception as error:
                error.add_note(f"in reward {self.__name__}, for completion {i}: {str(completion)[:200]!r}")
                raise
            scores.append(check_reward(score, f"what {self.__name__} returned for completion {i}"))
        return scores

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise UsageError when the function needs a column that is not among these."""
        if self.batched:
            self._need({"prompts", "completions", "completion_ids", *columns}, positional=0)
        else:
            self._need({"prompt", "completion", *columns}, positional=0 if "completion" in self._parameters else 2)

    @property
    def _takes_any(self) -> bool:
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    def _accepted(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in columns.items() if self._takes_any or n in self._parameters}

    def _need(self, given: set[str], *, positional: int) -> None:
        """Every required parameter is among what we can give."""
        free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        required = [p.name for p in self._parameters.values() if p.default is p.empty and p.kind not in free]
        missing = [name for name in required[positional:] if name not in given]
        if missing:
            raise UsageError(
                f"reward function {self.__name__} needs {missing[0]!r}, which is no column of the rows "
                f"(given: {', '.join(sorted(given))}); add the column or give the parameter a default"
            )

    def _call_one(self, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> Any:
        extra = self._accepted(columns)
        named = {"prompt": prompt, "completion": completion}
        by_name = self._parameters.get("completion")
        if by_name is not None and by_name.kind is not by_name.POSITIONAL_ONLY:
            return self.fn(**{n: v for n, v in named.items() if n in self._parameters}, **extra)
        positional = [
            p
            for p in self._parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty and p.name not in extra
        ]
        starred = any(p.kind is p.VAR_POSITIONAL for p in self._parameters.values())
        if len(positional) >= 2 or starred:
            return self.fn(prompt, completion, **extra)
        return self.fn(completion, **extra)

    def _call_batched(self, prompts: list, completions: list, columns: Mapping[str, Sequence[Any]]) -> list:
        """The way TRL does: by keyword, whole lists, answers as message lists where the prompts are messages."""
        shown = [self._as_trl(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        given: dict[str, Any] = {"prompts": prompts, "completions": shown, **{n: list(v) for n, v in columns.items()}}
        if all(hasattr(completion, "tokens") for completion in completions):
            given["completion_ids"] = [list(completion.tokens) for completion in completions]
        self._need(set(given), positional=0)
        scores = self.fn(**self._accepted(given))
        if inspect.isawaitable(scores):
            scores = _wait(scores)
        if hasattr(scores, "tolist"):
            scores = scores.tolist()
        if not isinstance(scores, (list, tuple)) or len(scores) != len(completions):
            got = f"{len(scores)} rewards" if isinstance(scores, (list, tuple)) else repr(scores)
            raise UsageError(
                f"{self.__name__} returned {got} for {len(completions)} completions: a function with a parameter named "
                "'completions' is given all of them and returns a list of as many numbers"
            )
        where = f"what {self.__name__} returned at "
        return [check_reward(score, f"{where}{i}", unscorable=True) for i, score in enumerate(scores)]

    def _as_trl(self, prompt: Any, completion: Any) -> Any:
        if isinstance(prompt, str):
            return completion
        if not isinstance(completion, str):
            raise UsageError(
                f"{self.__name__} takes answers as messages, but a {type(completion).__name__} has no text: "
                "write a function f(prompt, completion) that reads its tokens"
            )
        return [{"role": "assistant", "content": str(completion)}]


def _wait(awaitable: Any) -> Any:
    # A notebook's thread already runs an event loop, so the coroutine gets a thread of its own.
    async def run() -> Any:
        return await awaitable

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


def reward(fn: Callable) -> Reward:
    """Wrap a reward function so that ``[reward_fn(p, c) for p, c in zip(prompts, completions)]`` works for completions
    and for groups of them. It can decorate.

    A function with a parameter named ``completions`` is called as TRL calls it: by keyword, with ``prompts``,
    ``completions``, ``completion_ids`` and the columns as lists, answers as message lists when the prompts are
    messages; it may return None for a completion that it cannot score. Any other is called once a completion, as
    ``f(prompt, completion)`` or ``f(completion)``, with the columns it has parameters for.

    Raises:
        UsageError: when called: a reward that is NaN, infinite, None (from a function called once a completion), a bool
            or no number; a column the function needs and the rows lack.
    """
    return fn if isinstance(fn, Reward) else Reward(fn)


def score_batch(
    fn: Callable,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list:
    """Rewards nested like `completions`: a float for each, or a list for each group. TRL's kind is called once.

    Args:
        prompts: one for each entry of `completions`.
        completions: one completion, or one group, a prompt.
        columns: name -> one value a prompt.
    """
    columns = columns or {}
    for name, values in (("completions", completions), *columns.items()):
        if len(values) != len(prompts):
            raise UsageError(f"got {len(values)} {name} for {len(prompts)} prompts: give one (or one group) a prompt")
    groups = [list(each) if _is_group(each) else [each] for each in completions]
    sizes = [len(group) for group in groups]
    flat = {n: [v for v, size in zip(values, sizes, strict=True) for _ in range(size)] for n, values in columns.items()}
    every = [prompt for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]
    scores = iter(reward(fn).flat(every, [c for group in groups for c in group], flat))
    return [
        [next(scores) for _ in range(size)] if _is_group(each) else next(scores)
        for each, size in zip(completions, sizes, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------ text


def exact_match(completion: Any, answer: str, *, strip: bool = True, ignore_case: bool = False) -> Any:
    """1.0 when the completion is the answer, else 0.0; without surrounding white space unless ``strip=False``."""

    def clean(text: str) -> str:
        text = text.strip() if strip else text
        return text.casefold() if ignore_case else text

    return _over_group(lambda c: float(clean(str(c)) == clean(answer)), completion)


def regex_match(completion: Any, pattern: str | re.Pattern, *, full: bool = False) -> Any:
    """1.0 when the pattern is found (``full=True``: matches the whole completion), else 0.0."""
    compiled = re.compile(pattern)
    find = compiled.fullmatch if full else compiled.search
    return _over_group(lambda c: float(find(str(c)) is not None), completion)


def extract_tag(completion: Any, tag: str) -> Any:
    """The text of the last ``<tag>...</tag>`` without surrounding white space, or None."""

    def last(text: str) -> str | None:
        found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, flags=re.DOTALL)
        return found[-1].strip() if found else None

    return _over_group(lambda c: last(str(c)), completion)


def tag_format(completion: Any, tags: Sequence[str] = ("think", "answer")) -> Any:
    """1.0 when the completion is these tags in order, each once and closed, with only white space around; else 0.0."""
    shape = re.compile(r"\s*".join(rf"<{re.escape(t)}>(.*?)</{re.escape(t)}>" for t in tags), flags=re.DOTALL)

    def score(text: str) -> float:
        once = all(text.count(f"<{t}>") == 1 and text.count(f"</{t}>") == 1 for t in tags)
        return float(once and shape.fullmatch(text.strip()) is not None)

    return _over_group(lambda c: score(str(c)), completion)


# --------------------------------------------------------------------------------------------------------- numbers

# A minus belongs to the number unless something to subtract from stands before it.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\d] )(?<![)\d%])[-+])?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+\b)?"
)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}|([-+]?\d+)\s*/\s*(\d+)")
_LATEX_NOISE = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}|\\[,!;: ]|\\left|\\right")


def extract_number(completion: Any) -> Any:
    r"""The number a completion answers with, or None; a list for a group.

    Looked for in this order: after the last ``####``; inside the last ``\boxed{}``, when that holds a number or a
    fraction and nothing else; the last number in the text (only where there is no box). Thousands commas and ``$`` are
    taken away; ``50%`` is 50.
    """
    return _over_group(lambda c: _number(str(c)), completion)


def _number(text: str) -> float | None:
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    marked = text.rpartition("####")
    if marked[1]:
        line = marked[2].lstrip().partition("\n")[0]
        whole, found = _whole_number(line), _numbers(line)
        if whole is not None or found:
            return whole if whole is not None else found[0]
    boxed = _last_box(text)
    if boxed is not None:
        return _whole_number(boxed)
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[float]:
    found = []
    for match in _NUMBER.finditer(text):
        value = float(match.group().replace("$", "").replace(",", ""))
        if math.isfinite(value):
            found.append(value)
    return found


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


def _whole_number(text: str) -> float | None:
    text = _LATEX_NOISE.sub("", text).replace("$", "").strip().rstrip("%.").strip()
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, top, bottom, plain_top, plain_bottom = fraction.groups()
        bottom = int(bottom or plain_bottom)
        return None if bottom == 0 else int(plain_top or f"{sign}{top}") / bottom
    match = _NUMBER.fullmatch(text)
    return _numbers(text)[0] if match and _numbers(text) else None


def number_match(completion: Any, answer: float | int | str, *, tolerance: float = 1e-6) -> Any:
    """1.0 when `extract_number` gives the answer to within ``tolerance * max(1, |answer|)``, else 0.0.

    Args:
        answer: a number, or a text that `extract_number` reads (a GSM8K solution, for instance).
    """
    target = extract_number(answer) if isinstance(answer, str) else check_reward(answer, "answer")
    if target is None:
        raise UsageError(f"answer {answer!r} holds no number")

    def score(text: str) -> float:
        found = _number(text)
        return float(found is not None and abs(found - target) <= tolerance * max(1.0, abs(target)))

    return _over_group(lambda c: score(str(c)), completion)


_MATH_CHILD = """
import json, sys
from math_verify import parse, verify
request = json.load(sys.stdin)
gold = parse(request["answer"], parsing_timeout=request["timeout"])
scores = []
for text in request["completions"]:
    found = parse(text, parsing_timeout=request["timeout"])
    scores.append(bool(gold) and bool(verify(gold, found, timeout_seconds=request["timeout"])))
print(json.dumps({"parsed": bool(gold), "scores": scores}))
"""


def math_match(completion: Any, answer: str, *, timeout: int = 5) -> Any:
    """1.0 when math-verify finds the completion's answer equal to `answer` as mathematics, else 0.0.

    It bounds its own time with a signal, which only a main thread can receive; in other threads the group is compared
    in a child process.

    Args:
        answer: LaTeX or a number, with or without ``$``.
        timeout: seconds for reading, and for comparing, each answer.

    Raises:
        MissingDependencyError: math-verify is not installed.
        UsageError: it cannot read `answer`.
    """
    try:
        import math_verify
    except ImportError:
        raise MissingDependencyError("math_match needs math-verify: pip install math-verify") from None
    gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    texts = [str(c) for c in (completion if _is_group(completion) else [completion])]
    if threading.current_thread() is threading.main_thread():
        parsed = math_verify.parse(gold, parsing_timeout=timeout)
        found = [math_verify.parse(text, parsing_timeout=timeout) for text in texts]
        equal = [bool(parsed) and math_verify.verify(parsed, each, timeout_seconds=timeout) for each in found]
    else:
        request = json.dumps({"answer": gold, "completions": texts, "timeout": timeout})
        limit = 60 + 4 * timeout * (len(texts) + 1)
        command = [sys.executable, "-P", "-c", _MATH_CHILD]
        child = subprocess.run(command, input=request, capture_output=True, text=True, timeout=limit)
        if child.returncode != 0:
            raise StateError(f"math-verify failed in its child process: {child.stderr.strip()[-500:]}")
        result = json.loads(child.stdout.splitlines()[-1])
        parsed, equal = result["parsed"], result["scores"]
    if not parsed:
        raise UsageError(f"math-verify cannot read the answer {answer!r}")
    scores = [float(each) for each in equal]
    return scores if _is_group(completion) else scores[0]


__all__ = [
    "Reward",
    "RunResult",
    "exact_match",
    "extract_code",
    "extract_number",
    "extract_tag",
    "math_match",
    "number_match",
    "regex_match",
    "reward",
    "run_python",
    "score_batch",
    "tag_format",
    "unit_tests",
]

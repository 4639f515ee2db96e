"""`local-tinker runs list | show | compare`: the history of runs in a folder."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import list_checkpoints
from ..errors import UsageError
from ..lookup import find_run
from ..runs import Run, compare, final_metrics, list_runs
from . import output
from .app import PROGRAM, run_typer

_STYLES = {"finished": "green", "running": "yellow", "failed": "red", "interrupted": "red"}
Root = Annotated[Path, typer.Option("--root", help="The folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def runs(argv: list[str]) -> int:
    """Dispatch `runs ACTION`; without an action, `runs list`."""
    word = argv[0] if argv else "list"
    if word in ("-h", "--help"):
        print(_help())
        return 0
    if word.startswith("-"):
        argv, word = ["list", *argv], "list"
    if word not in _ACTIONS:
        near = difflib.get_close_matches(word, _ACTIONS, 1)
        raise UsageError(f"no action {word!r} of runs; {f'did you mean {near[0]}?' if near else 'see runs --help'}")
    action, summary = _ACTIONS[word]
    return run_typer(action, argv[1:], name=f"runs {word}", summary=summary)


def list_(root: Root = Path("runs"), json: AsJson = False) -> None:
    """List the runs in a folder, newest last."""
    found = list_runs(root, say=output.note)
    if json:
        output.as_json([_summary(run) for run in found])
        return
    if not found:
        print(f"no runs in {root}")
        return
    rows = []
    for run in found:
        last = final_metrics(run, say=output.note)
        rows.append([run.id, run.status, _number(last.get("step")), _number(last.get("loss")), _time(run.seconds)])
        rows[-1].append(_short(run.cause or ""))
    print(output.table(["RUN", "STATUS", "STEP", "LOSS", "TIME", "CAUSE"], rows, right=_RIGHT, styles=_STYLES))


def show(
    run: Annotated[str, typer.Argument(help="A run: its id, the start of it, name, folder, or last.")],
    root: Root = Path("runs"),
    json: AsJson = False,
) -> None:
    """Show one run: how it ended, what it was given, what came out, and what it can be resumed from."""
    found = find_run(run, root, say=output.note)
    saved, last = list_checkpoints(found.checkpoints), final_metrics(found, say=output.note)
    if json:
        details = {"metrics": last, "checkpoints": [checkpoint.name for checkpoint in saved]}
        output.as_json(_finite({**found.record, **details}))
        return
    record = found.record
    git, best = record.get("git"), record.get("best")
    commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "no repository"
    facts = {
        "status": record["status"] + (f" ({record['cause']})" if record["cause"] else ""),
        "folder": str(found.path),
        "started": f"{record['created'][:19].replace('T', ' ')} UTC",
        "time": _time(record["seconds"])
        + (f" in {len(record['sessions'])} sessions" if record["sessions"][1:] else ""),
        "git": commit,
        "command": record["sessions"][-1].get("command", "unknown"),
        "checkpoints": ", ".join(checkpoint.name for checkpoint in saved) or "none",
        **(
            {"best": f"{best['metric']} {best['value']:.6g} after step {best['step']}: {best['folder']}"}
            if best
            else {}
        ),
    }
    print(_block(found.id, facts))
    for title, values in (
        ("config", record["config"]),
        ("final metrics", {name: _number(value) for name, value in last.items()}),
        ("data (sha256)", record.get("data", {})),
        ("seeds", record.get("seeds", {})),
        ("versions", record.get("versions", {})),
    ):
        if values:
            print(f"\n{_block(title, values)}")


def compare_(
    first: Annotated[str, typer.Argument(help="A run: its id, the start of it, name, folder, or last.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    root: Root = Path("runs"),
    json: AsJson = False,
) -> None:
    """Compare two runs: what was set differently, and where each ended."""
    left, right = (find_run(word, root, say=output.note) for word in (first, second))
    result = compare(left, right, say=output.note)
    parts = {"config": result.config, "data": result.data, "versions": result.versions, "metrics": result.metrics}
    if json:
        output.as_json(_finite({"runs": [left.id, right.id], **parts}))
        return
    if not result.config:
        print("config: the same")
    for title, pairs in parts.items():
        if pairs:
            rows = [[name, *(_number(value) for value in pair)] for name, pair in pairs.items()]
            print(output.table([title.upper(), left.id, right.id], rows) + "\n")


_ACTIONS = {
    "list": (list_, "List the runs in a folder."),
    "show": (show, "Show one run."),
    "compare": (compare_, "Compare two runs."),
}
_RIGHT = ("STEP", "LOSS", "TIME")


def _summary(run: Run) -> dict[str, Any]:
    return _finite(
        {
            "id": run.id,
            "name": run.name,
            "status": run.status,
            "cause": run.cause,
            "created": run.created,
            "seconds": round(run.seconds, 3),
            "folder": str(run.path),
            "metrics": final_metrics(run, say=output.note),
        }
    )


def _finite(value: Any) -> Any:
    """NaN and infinity as strings, the way metrics.jsonl spells them: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _block(title: str, values: dict[str, Any]) -> str:
    width = max(map(len, values))
    return "\n".join([title, *(f"  {key:<{width}}  {_number(value)}" for key, value in values.items())])


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _help() -> str:
    width = max(map(len, _ACTIONS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in _ACTIONS.items()]
    return "\n".join([f"Usage: {PROGRAM} runs ACTION [OPTIONS]", "", "The history of runs.", "", "Actions:", *lines])

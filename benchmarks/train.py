"""Training speed and memory, ours beside TRL, Unsloth and plain glue: the same documents on the same card in one run.

python -m benchmarks.train                                      # Llama-3.2-3B's dimensions, memory free
python -m benchmarks.train --model qwen2.5-7b --cases tight     # a set of cases, see --list
python -m benchmarks.train --cases ours,ours@gib=3.6,unsloth@gc=0@mean=60 --profile
python -m benchmarks.train --cases ours@model=llama3.1-8b@gib=22.5@search=81920
python -m benchmarks.train --tiny                               # every side but Unsloth on a CPU in a minute, nothing kept
python -m benchmarks.train --collect a/train.jsonl b/train.jsonl    # one table of several runs

A case is a side and what it changes: side@key=value@key=value (`--list` names the keys). Each runs in a process of its own
with a time-out; one that fails prints why and the rest go on. Weights are random, documents too: see benchmarks/work.py.
tok/s counts the documents' tokens. MFU is the FLOPs that training needs, without recomputation, against the rate of a large
bf16 matrix product measured on this card in this run. Peak is what torch's allocator handed out at most after warming up.
TRL comes with the extra `test`; glue wants liger-kernel, and Unsloth, whose pins differ, a folder of its own:
pip install --target DIR/site-packages unsloth trl==1.15.0 'datasets<5', then --unsloth-site DIR/site-packages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from . import report, work
from .work import Case

SETS = {
    "free": "ours,unsloth@gc=0,glue@gc=0,trl@gc=0,unsloth,glue,trl",
    "tight": "ours@gib=3.6,unsloth,trl",
    "short": "ours@mean=60,unsloth@mean=60@gc=0,glue@mean=60@gc=0,trl@mean=60@gc=0",
    "losses": "ours,ours@loss=importance_sampling,ours@loss=grpo,ours@loss=cross_entropy",
    "half": "ours@share=0.5,unsloth@share=0.5@gc=0,glue@share=0.5@gc=0,trl@share=0.5@gc=0",
    "tiny": "ours,ours@loss=grpo,glue@gc=0,trl",
}
PEERS = ("trl", "unsloth", "liger-kernel", "peft", "accelerate", "datasets")
LEAST = 20  # seconds left of the budget under which no case is started


def main() -> None:
    options = _arguments()
    if options.child:
        return _child(json.loads(options.child))
    if options.list:
        return _list()
    if options.collect:
        lines = [json.loads(line) for path in options.collect for line in path.read_text().splitlines()]
        _finish([line for line in lines if "case" in line], _first_card(lines), options, options.out)
        return None
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            failed = _run(options, options.out or Path(folder), Path(folder))
        sys.exit(f"{failed} of the cases failed" if failed else 0)
    _run(options, options.out, options.models)
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama3.2-3b", help="one or several with commas; a case's @model= goes first")
    add("--cases", default="free", help="cases and names of sets, with commas")
    add("--steps", type=int, default=8)
    add("--warmup", type=int, default=3)
    add("--budget", type=float, default=560.0, help="seconds for everything; cases that no longer fit are skipped")
    add("--timeout", type=float, default=180.0, help="seconds a case may take, loading included")
    add("--profile", action="store_true", help="also profile one step of each of our cases, into profile.txt")
    add("--out", type=Path, help="where results are written; default: benchmarks/results, and nowhere with --tiny")
    add("--name", help="of the result files; default: train_ and the card")
    add(
        "--models",
        type=Path,
        help="where the random models are put; default: /dev/shm or the temporary files; removed when done with",
    )
    add("--keep-models", action="store_true")
    add("--unsloth-site", type=Path, help="site-packages folder for Unsloth's cases, where its pins differ")
    add("--tiny", action="store_true", help="a small model on the CPU; fails when a case does")
    add("--list", action="store_true", help="sides, their keys, sets and models")
    add("--collect", type=Path, nargs="+", help="jsonl files of earlier runs: write their common table")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None and not options.tiny:
        options.out = report.RESULTS
    if options.tiny:
        options.model, options.steps, options.warmup = "tiny", 2, 1
        options.cases = "tiny" if options.cases == "free" else options.cases
    return options


def cases(text: str, base: Case) -> list[Case]:
    """Names of sets expanded, in order."""
    names = ",".join(SETS.get(name.strip(), name) for name in text.split(","))
    return [work.parse(name, base) for name in names.split(",") if name.strip()]


def _list() -> None:
    for side, keys in work.SIDES.items():
        print(f"{side:<8} {' '.join(keys)}")
    for name, text in SETS.items():
        print(f"{name:<8} {text}")
    print(f"models   {' '.join(work.MODELS)}")
    print(Case.__doc__)


# -- the run -------------------------------------------------------------------------------------------------------------


def _place(model: str, models: Path | None) -> Path:
    """Where a model's weights go: in memory where they fit with room to spare, else on the disk of temporary files."""
    if models is None:
        size, memory = 2 * work.dims(model).params, Path("/dev/shm")
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.5 * size
        models = (memory if fits else Path(tempfile.gettempdir())) / f"local-tinker-train-{os.getuid()}"
    return models / model


def _run(options: argparse.Namespace, out: Path, models: Path | None) -> int:
    """All cases, model by model; returns how many failed."""
    end = time.monotonic() + options.budget
    device = "cpu" if options.tiny or report.machine()["kind"] == "cpu" else "cuda"
    bases = [
        Case(name="", side="ours", model=model.strip(), steps=options.steps, warmup=options.warmup)
        for model in options.model.split(",")
    ]
    if options.tiny:
        bases = [replace(base, longest=64, mean=20.0, rows=2) for base in bases]
    todo = [case for base in bases for case in cases(options.cases, base)]
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "train.jsonl"

    def note(line: dict) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({k: v for k, v in line.items() if k != "trace"}), flush=True)

    card: dict = {}
    results: list[dict] = []
    for model in dict.fromkeys(case.model for case in todo):
        folder = _place(model, models)
        size = None if card else 256 if options.tiny else 8192
        job = {"job": "model", "model": model, "folder": str(folder), "device": device, "measure": size}
        made = _spawn(job, min(240, end - time.monotonic()), out)
        if not card:
            if "rates" not in made:
                sys.exit(f"the card could not be measured: {made['error']}\n{made.get('trace', '')}")
            card = {**report.machine(), **made["rates"]}
            note({"card": card})
        print(json.dumps(made), flush=True)
        for case in (case for case in todo if case.model == model):
            left = end - time.monotonic()
            if "error" in made:
                result = made
            elif left < LEAST:
                result = {"error": "skipped: the budget is used up"}
            else:
                result = _spawn(_job(case, folder, device, card, options, out), min(options.timeout, left), out)
            results.append({**_described(case), **result})
            note(results[-1])
        if not options.keep_models:
            shutil.rmtree(folder, ignore_errors=True)
    _finish(results, card, options, out)
    return sum("error" in result for result in results)


def _job(case: Case, folder: Path, device: str, card: dict, options: argparse.Namespace, out: Path) -> dict:
    profile = str(out / "profile.txt") if options.profile and case.side == "ours" and not case.search else None
    job = {"job": "case", "case": asdict(case), "folder": str(folder), "device": device, "profile": profile}
    site = str(options.unsloth_site) if case.side == "unsloth" and options.unsloth_site else None
    return job | {"peak_flops": card["tflops"] * 1e12, "site": site}


def _spawn(job: dict, timeout: float, out: Path) -> dict:
    """A job in a process of its own, with its children ended at the time-out; its last result, or why there is none."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if job.get("site"):
        environment["PYTHONPATH"] = os.pathsep.join([job["site"], os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    command = [sys.executable, "-m", "benchmarks.train", "--child", json.dumps(job)]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(timeout, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            _kill(process)
            raise
        _kill(process)
        log.seek(0)
        text = log.read()
    name = job["case"]["name"] if "case" in job else job["job"]
    with (out / "train.log").open("a", encoding="utf-8") as file:
        file.write(f"==== {name}\n{text}\n")
    lines = [line[7:] for line in text.splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1]) if lines else {}
    if code is None:
        result["error" if not lines else "note"] = f"stopped after {timeout:.0f} s"
    elif not lines:
        result["error"] = f"exit status {code}"
    if "error" in result:
        result.setdefault("trace", text[-1500:])
    return {**result, "wall_s": round(time.monotonic() - start, 1)}


def _kill(process: subprocess.Popen) -> None:
    """The process and what it started, which shares its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


# -- in the child ----------------------------------------------------------------------------------------------------------


def _child(job: dict) -> None:
    try:
        _say({"model": _model, "case": _case}[job["job"]](job))
    except BaseException as error:
        # the parent shows it beside the case; nothing else of this process is of use
        _say({"error": f"{type(error).__name__}: {str(error)[:600]}", "trace": traceback.format_exc()[-3000:]})
        sys.exit(1)


def _say(result: dict) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def _model(job: dict) -> dict:
    """The first of a run measures the card too; those rates are said at once, whatever becomes of the model."""
    from .meter import card

    found: dict = {}
    if job["measure"]:
        found["rates"] = card(job["device"], size=job["measure"])
        _say(found)
    start = time.perf_counter()
    folder = work.save_model(job["model"], Path(job["folder"]), job["device"])
    return found | {"made": str(folder), "seconds": round(time.perf_counter() - start, 1)}


def _case(job: dict) -> dict:
    case, folder = Case(**job["case"]), Path(job["folder"])
    arguments = (case, folder, job["device"], job["peak_flops"])
    if case.side == "ours":
        from . import ours

        return ours.run(*arguments, profile=Path(job["profile"]) if job["profile"] else None, say=_say)
    if case.side == "unsloth":
        from .peers import unsloth as peer
    elif case.side == "trl":
        from .peers import trl as peer
    else:
        from .peers import glue as peer
    return {**peer.run(*arguments), "versions": _versions()}


def _versions() -> dict[str, str]:
    """Of the peers' packages as this process sees them."""
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- the table -------------------------------------------------------------------------------------------------------------


def _described(case: Case) -> dict:
    """What a result is of: the case's settings."""
    return {"case": case.name, **{k: v for k, v in asdict(case).items() if k != "name"}}


def _first_card(lines: list[dict]) -> dict:
    cards = [line["card"] for line in lines if "card" in line]
    names = {card["device"] for card in cards}
    if len(names) != 1:
        sys.exit(f"these runs are of different cards, {sorted(names)}; collect those of one card")
    return cards[0]


def _finish(results: list[dict], card: dict, options: argparse.Namespace, out: Path) -> None:
    name = options.name or "train_" + "".join(c if c.isalnum() else "_" for c in card["device"].lower())
    shown = table(results, card)
    print("\n" + shown)
    kept = [{k: v for k, v in result.items() if k != "trace"} for result in results]
    rates = {k: card[k] for k in ("tflops", "copy_gb_s", "gemm_size")}
    report.write(name, {"card": rates, "results": kept}, folder=out)
    (out / f"{name}.md").write_text(shown, encoding="utf-8")


def table(results: list[dict], card: dict) -> str:
    """Markdown, fastest first within a model and a kind of work."""
    versions = {k: v for result in results for k, v in result.get("versions", {}).items()} | card["versions"]
    lines = [
        f"{card['device']}, {card['tflops']:.0f} TFLOP/s on a bf16 product of {card['gemm_size']} cubed, "
        f"{card['copy_gb_s']:.0f} GB/s copied; {', '.join(f'{k} {v}' for k, v in versions.items())}",
        "",
        "| model | documents | case | tok/s | MFU | peak GiB | tokens a step | ms a step |",
        "|-|-|-|-:|-:|-:|-:|-:|",
    ]
    for result in sorted(results, key=lambda r: (r["model"], _kind(r), -r.get("tokens_s", 0.0))):
        place = f"| {result['model']} r{result['rank']} | {_kind(result)} | {result['case']} |"
        if "error" in result:
            lines.append(f"{place} {result['error'].splitlines()[0][:120].replace('|', '/')} | | | | |")
        elif "context" in result and result.get("search"):
            lines.append(f"{place} longest context {result['context']:,} tokens | | | | |")
        else:
            peak = f"{result['peak_gib']:.2f}" if "peak_gib" in result else "-"
            rate = f"{result['tokens_s']:,.0f} | {result['mfu']:.1%} | {peak}"
            lines.append(f"{place} {rate} | {result['tokens_a_step']:,.0f} | {result['ms_a_step']:.1f} |")
    return "\n".join(lines) + "\n"


def _kind(result: dict) -> str:
    if result.get("search") or result["context"]:
        return f"one of {result['context']:,}"
    loss = "" if result["share"] == 1.0 else f", {result['share']:.0%} with loss"
    return f"mean {result['mean']:.0f}, at most {result['longest']}{loss}"


if __name__ == "__main__":
    main()

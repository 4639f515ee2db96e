"""`local-tinker plan`: where the memory of a training step goes, and what to change when it does not fit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..engine.footprint import COMPUTE, GIB, QUANTIZE, TrainSettings
from ..engine.memory import plan_training
from ..errors import UsageError
from ..hardware import detect, fp8_fault
from ..model import catalogue
from ..recipes.report import gib
from . import output


def plan(
    model: Annotated[str, typer.Argument(help="A catalogue alias, hub id on this machine, or folder.")],
    vram: Annotated[
        float | None, typer.Option(help="Answer for a card of this many GiB, not for this machine.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 32,
    quantize: Annotated[str, typer.Option(help="How the base weights are held: 4bit, 8bit or none.")] = "4bit",
    seq_len: Annotated[int, typer.Option(help="The longest row in tokens, which is never cut.")] = 0,
    compute: Annotated[str | None, typer.Option(help="fp8: base products of 8-bit floats.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where the memory of a training step goes, what the engine would choose, and what needs less.

    Nothing is loaded or downloaded. The batch size does not matter: batches are cut to fit.
    """
    if quantize not in QUANTIZE:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    if vram is not None and not 0 < vram < 100_000:
        raise UsageError(f"--vram takes the card's memory in GiB, such as 24; got {vram:g}")
    if rank < 1 or seq_len < 0:
        raise UsageError(f"--rank must be >= 1 and --seq-len >= 0, got {rank} and {seq_len}")
    if compute not in COMPUTE:
        raise UsageError(f"--compute takes fp8 or is left out, got {compute!r}")
    dims = catalogue.dims(model)
    if seq_len > dims.max_positions:
        raise UsageError(f"--seq-len {seq_len:,} is longer than the context of {model}, {dims.max_positions:,} tokens")
    hardware = None if vram is not None else detect()
    if hardware is not None and compute == "fp8" and (reason := fp8_fault(hardware.capability)) is not None:
        raise UsageError(f"--compute fp8 does not run here: {reason}; leave it out, or give --vram for another card")
    kind, size = (hardware.kind, 2 if hardware.bf16 else 4) if hardware else ("cuda", 2)
    free = round(vram * GIB) if vram is not None else hardware.free_bytes
    settings = TrainSettings(
        kind=kind, rank=rank, quantize=quantize, seq_len=seq_len, compute_bytes=size, fp8=compute == "fp8"
    )
    found = plan_training(dims, settings, free)
    if json:
        answer = {
            "model": model,
            "free_bytes": free,
            "total_bytes": found.total,
            "fits": found.fits,
            "parts": found.parts,
            "host_bytes": found.host_bytes,
        }
        answer |= {"choice": asdict(found.choice), "levers": [asdict(lever) for lever in found.levers]}
        output.as_json(answer)
        return
    where = f"a card with {gib(free)}" if hardware is None else f"{hardware.name}, {gib(free)} free"
    print(f"{model}, {'not quantised' if quantize == 'none' else quantize}, rank {rank}, on {where}\n")
    rows = [(name, gib(size)) for name, size in found.parts.items() if size]
    print(output.table(("PART", "BYTES"), [*rows, ("total", gib(found.total))], right=("BYTES",)))
    if found.host_bytes:
        print(f"and {gib(found.host_bytes)} of host memory")
    print(f"\n{'fits' if found.fits else 'does not fit'}; choice: {found.words}")
    if found.levers:
        print("to need less:")
    for lever in found.levers:
        print(f"  {lever.change}: saves {gib(lever.saves)}{_pace(lever.slower)}")


def _pace(slower: float | None) -> str:
    """Predicted change of time."""
    return "" if slower is None else ", at the same speed" if slower < 0.005 else f", about {slower:.0%} slower"

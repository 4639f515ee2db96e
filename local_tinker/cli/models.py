"""`local-tinker models`: what can be trained here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..engine.footprint import GIB, QUANTIZE
from ..errors import UsageError
from ..hardware import Hardware, detect
from . import output

_STYLES = {"ready": "green", "tight": "yellow", "OOM": "red"}


def models(
    vram: Annotated[
        float | None, typer.Option(help="Answer for a card of this many GiB, not for this machine.")
    ] = None,
    quantize: Annotated[str, typer.Option(help="How the base weights are held: 4bit, 8bit or none.")] = "4bit",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List models, the memory they need here, and whether they fit.

    VRAM is the peak of a supervised step of 4,096 tokens at rank 32 with every memory saver on. STATUS: "ready" fits
    with room to spare, "tight" only with small micro-batches, "OOM" does not fit.
    """
    from ..engine.fit import model_table

    if quantize not in QUANTIZE:
        raise UsageError(f"--quantize must be one of {', '.join(QUANTIZE)}, got {quantize!r}")
    if vram is not None and not 0 < vram < 100_000:
        raise UsageError(f"--vram takes the card's memory in GiB, such as 24; got {vram:g}")
    hardware = None if vram is not None else detect()
    free = round(vram * GIB) if vram is not None else hardware.free_bytes
    rows = model_table(hardware, quantize=quantize, free_bytes=free)
    if json:
        output.as_json({"hardware": asdict(hardware) if hardware else None, "free_bytes": free, "models": rows})
        return
    print(f"{_headline(hardware, free)}\n\n{_table(rows)}\n")
    print("VRAM: peak of a 4,096-token SFT step at rank 32.")
    print("DISK *: the weights are here already.")
    print("Any Hugging Face id or local folder works as well.")


def _headline(hardware: Hardware | None, free: int) -> str:
    if hardware is None:
        return f"For a card with {output.gib(free)} free:"
    amounts = f"{output.gib(free)} of {output.gib(hardware.total_bytes)} free"
    if hardware.kind == "cuda":
        more = f" (first of {hardware.count} cards)" if hardware.count > 1 else ""
        return f"{hardware.name}{more}: {amounts}"
    return (
        f"No GPU: {hardware.note}.\n"
        f"Measured against RAM ({amounts}); a CPU trains slowly, start small.\n"
        "--vram 24 answers for a 24 GiB card."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["name"],
            _count(row["params"]),
            row["quantize"],
            output.gib(row["vram_bytes"]),
            row["status"],
            "*" if row["on_disk"] else "",
        )
        for row in rows
    ]
    headers = ("MODEL", "PARAMS", "QUANT", "VRAM", "STATUS", "DISK")
    return output.table(headers, cells, right=("PARAMS", "VRAM"), styles=_STYLES)


def _count(params: int) -> str:
    return f"{params / 1e9:.1f}B" if params >= 1e9 else f"{params / 1e6:.0f}M"

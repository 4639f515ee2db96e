"""Rows -> conversations -> tokens and weights -> Datums -> packed micro-batches."""

from .batches import Batches, batches
from .pack import pack
from .prepare import Prepared, check_rows, to_units
from .read import load_rows
from .render import Encoded, Renderer
from .rows import Row, Rows, RowSource

__all__ = [
    "Batches",
    "Encoded",
    "Prepared",
    "Renderer",
    "Row",
    "RowSource",
    "Rows",
    "batches",
    "check_rows",
    "load_rows",
    "pack",
    "to_units",
]

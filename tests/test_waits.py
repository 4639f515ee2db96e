"""What would make the host wait for the card in the middle of a run."""

import ast
from pathlib import Path

import pytest

import local_tinker

ROOT = Path(local_tinker.__file__).parent
# what runs while the card has work queued
BUSY = sorted(
    path
    for pattern in (
        "sampler/*.py",
        "losses/*.py",
        "engine/step.py",
        "engine/micro_*.py",
        "engine/optimiser.py",
        "model/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.name not in ("attention.py", "road.py", "load.py")  # fallbacks without Triton, and what runs at load
)


def pageable(source: str) -> list[int]:
    """Lines that make a tensor of numbers on a device in one go: torch copies it from pageable memory, and waits."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("tensor", "as_tensor")
        and any(keyword.arg == "device" for keyword in node.keywords)
    ]


@pytest.mark.parametrize("path", BUSY, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_go_to_the_card_from_pinned_memory(path):
    # finish_metrics reads, so it waits anyway
    allowed = {"base.py": 1}.get(path.name, 0)
    assert len(pageable(path.read_text(encoding="utf-8"))) == allowed


def test_what_is_looked_for_is_found():
    lines = ["x = torch.tensor([1], device=d)", "y = torch.tensor(1.0)", "z = torch.as_tensor(s, device=d)"]
    assert pageable("\n".join(lines)) == [1, 3]

"""Imports point one way: cli, recipes -> clients -> engine -> model, data, losses, sampler -> types, errors."""

import ast
from pathlib import Path

import local_tinker

ROOT = Path(local_tinker.__file__).parent
LAYERS = {
    "types": 0,
    "errors": 0,
    "hardware": 0,
    "out_of_memory": 0,
    "model": 1,
    "data": 1,
    "losses": 1,
    "sampler": 1,
    "engine": 2,
    "service": 3,
    "training": 3,
    "sampling": 3,
    "recipes": 4,
    "server": 4,
    "cli": 5,
    "__main__": 6,
}
TORCHLESS = ("types.py", "errors.py", "hardware.py", "model/catalogue.py", "model/dims.py", "engine/memory.py")


def imports(path: Path, root: Path, *, top_level_only: bool = False):
    """(dotted name inside the package or outside it, line) of every import statement of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("local_tinker", *path.relative_to(root).with_suffix("").parts[:-1])
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "local_tinker" and len(parts) > 1 else None


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        for dotted, line in imports(path, root):
            there = room(dotted)
            if here in LAYERS and there in LAYERS and LAYERS[there] > LAYERS[here]:
                found.append(f"{path.relative_to(root)}:{line} imports {dotted}")
    return found


def test_no_room_imports_from_a_higher_one():
    assert violations(ROOT) == []


def test_the_walk_sees_relative_absolute_and_nested_imports(tmp_path):
    for name, text in {
        "data/a.py": "from ..engine import step\n",
        "data/b.py": "def f():\n    from local_tinker.cli.app import main\n",
        "model/kernels/c.py": "from ...service import ServiceClient\n",
        "engine/d.py": "from ..data import pack\nfrom ..types import Datum\nfrom . import memory\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == [
        "data/a.py:1 imports local_tinker.engine.step",
        "data/b.py:2 imports local_tinker.cli.app.main",
        "model/kernels/c.py:1 imports local_tinker.service.ServiceClient",
    ]


def test_light_files_import_no_torch_or_transformers_at_module_scope():
    light = [ROOT / name for name in TORCHLESS]
    for folder in ("data", "cli", "checkpoint"):
        light += sorted((ROOT / folder).rglob("*.py"))
    heavy = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in light
        for dotted, line in imports(path, ROOT, top_level_only=True)
        if dotted.split(".")[0] in ("torch", "transformers", "peft", "bitsandbytes")
    ]
    assert heavy == []

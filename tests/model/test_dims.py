import pytest

from local_tinker.errors import ModelError
from local_tinker.model.dims import ModelDims, rows_below

LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}


def test_a_config_gives_its_dimensions():
    dims = ModelDims.from_config(LLAMA_3B)
    assert (dims.head_dim, dims.query, dims.key, dims.tied, dims.qkv_bias) == (128, 3072, 1024, True, False)
    # 28 x (3072 x 3072 x 2 + 3072 x 1024 x 2 + 3 x 3072 x 8192): the 2.819B of the published table
    assert dims.linear_params == 28 * (18_874_368 + 6_291_456 + 75_497_472) == 2_818_572_288


def test_a_text_config_inside_a_multimodal_one_is_read():
    outer = {"model_type": "gemma3", "text_config": {**LLAMA_3B, "model_type": "gemma3_text", "head_dim": 256}}
    outer["text_config"].pop("tie_word_embeddings")
    dims = ModelDims.from_config(outer)
    assert (dims.model_type, dims.head_dim, dims.tied) == ("gemma3_text", 256, True)


def test_missing_optional_fields_take_their_familys_defaults():
    config = {k: v for k, v in LLAMA_3B.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    dims = ModelDims.from_config({**config, "model_type": "qwen2", "head_dim": None})
    assert (dims.kv_heads, dims.head_dim, dims.tied, dims.qkv_bias) == (24, 128, False, True)


@pytest.mark.parametrize("value", [None, 0, -1, "28", True, 2.5])
def test_an_unusable_dimension_is_refused_by_name(value):
    with pytest.raises(ModelError, match="num_hidden_layers = "):
        ModelDims.from_config({**LLAMA_3B, "num_hidden_layers": value})


@pytest.mark.parametrize(
    "name", ["qwen3", "olmo2", "gemma2", "gemma3_text", "llama", "qwen2", "phi3", "mistral", "smollm3"]
)
def test_parameter_counts_are_those_of_the_real_modules(name):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # phi3 has no head_dim of its own to set
    more = {} if name == "phi3" else {"head_dim": 16}
    config = CONFIG_MAPPING[name](
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    assert ModelDims.from_config(config.to_dict()).params == counted


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank", "rows"),
    [(3072, 3072, 32, 128), (3072, 8192, 160, 256), (3000, 3072, 16, 72), (3584, 18944, 16, 16), (3072, 3072, 0, 0)],
)
def test_an_adapters_rows_fill_a_tile_where_that_is_faster(outputs, inputs, rank, rows):
    assert rows_below(outputs, inputs, rank) == rows

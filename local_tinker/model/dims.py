"""The dimensions of a decoder, and the parameter counts that follow from them. No torch, no I/O.

H hidden, F intermediate, Q query width (heads x head_dim), K key width (kv heads x head_dim), L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ModelError

# Products of many rows run up to a fifth faster where their outputs, the adapter's among them, are a multiple of 128.
# Measured on an H100 at 256 rows with 3,072 to 8,192 inputs; with 18,944 the wider product was 6 % slower.
ADAPTER_TILE, ADAPTER_TILE_INPUTS = 128, 8192


def rows_below(outputs: int, inputs: int, rank: int) -> int:
    """Rows that stand below one projection's dense weights for an adapter of this rank, on a card."""
    if not rank or inputs > ADAPTER_TILE_INPUTS:
        return rank
    return -(-(outputs + rank) // ADAPTER_TILE) * ADAPTER_TILE - outputs


_CONFIG_FIELDS = {
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}
# What a family's config.json may leave out because its configuration class ties embeddings by default.
_TIED_BY_DEFAULT = {"gemma", "gemma2", "gemma3_text", "smollm3"}
_HEAD_DIM_BY_DEFAULT = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128}
# (norm vectors of width H a layer, query/key norm): "head" norms each head, "full" the whole projection.
_NORMS = {
    "gemma2": (4, None),
    "gemma3_text": (4, "head"),
    "olmo2": (2, "full"),
    "qwen3": (2, "head"),
}


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """What memory and time depend on.

    Args:
        qkv_bias: the q, k and v projections carry a bias (Qwen2).
        max_positions: the longest sequence the model was made for.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    qkv_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelDims:
        """From the mapping of a config.json; a multimodal config is read through its `text_config`.

        Raises:
            ModelError: a field is missing or not a positive number.
        """
        tied = config.get("tie_word_embeddings")
        if isinstance(config.get("text_config"), Mapping):
            config = config["text_config"]
            tied = config.get("tie_word_embeddings", tied)
        model_type = config.get("model_type") or "unknown"
        values = {}
        for name, ours in _CONFIG_FIELDS.items():
            value = config.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ModelError(
                    f"config.json of model type {model_type!r} gives {name} = {value!r}; "
                    "a decoder with a positive integer there is needed (encoder and older layouts are not supported)"
                )
            values[ours] = value
        heads = values["heads"]
        default_dim = _HEAD_DIM_BY_DEFAULT.get(model_type, values["hidden"] // heads)
        return cls(
            model_type=model_type,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_dim,
            tied=bool(tied) if tied is not None else model_type in _TIED_BY_DEFAULT,
            max_positions=config.get("max_position_embeddings") or 2048,
            qkv_bias=bool(config.get("attention_bias", model_type == "qwen2")),
            **values,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear projections; fused ones are counted by their parts."""
        h, f, q, k = self.hidden, self.intermediate, self.query, self.key
        return {
            "q_proj": (h, q),
            "k_proj": (h, k),
            "v_proj": (h, k),
            "o_proj": (q, h),
            "gate_proj": (h, f),
            "up_proj": (h, f),
            "down_proj": (f, h),
        }

    @cached_property
    def linear_params(self) -> int:
        """Weights of every layer's projections: what is quantised and what LoRA adapts."""
        return self.layers * sum(i * o for i, o in self.projections.values())

    @property
    def embedding_params(self) -> int:
        """Embeddings and output head; a tied table is counted once."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def small_params(self) -> int:
        """Norms and biases."""
        norms, qk = _NORMS.get(self.model_type, (2, None))
        layer = norms * self.hidden
        layer += {"head": 2 * self.head_dim, "full": self.query + self.key, None: 0}[qk]
        layer += (self.query + 2 * self.key) if self.qkv_bias else 0
        return self.layers * layer + self.hidden

    @property
    def params(self) -> int:
        return self.linear_params + self.embedding_params + self.small_params

    def lora_params(self, rank: int) -> int:
        """Adapter parameters over all linear projections: rank x (in + out) each."""
        return self.layers * sum(rank * (i + o) for i, o in self.projections.values())

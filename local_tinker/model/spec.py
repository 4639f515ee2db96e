"""What a decoder family looks like, read from its transformers config: one entry a family.

A config that asks for something the generic layer cannot express gets a `Refusal` with the reason, never a guess; the
model then runs on the plain road.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

# Norm module names inside a layer: before attention, after it, before the MLP, after it.
PLACEMENTS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class FamilySpec:
    """The structure of one model.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: the sizes.
        fused: True when q,k,v are one projection `qkv_proj` and gate,up one `gate_up_proj`.
        activation: of the gated MLP: "silu", "gelu_tanh" or "gelu".
        placement: where the norms stand, a key of `PLACEMENTS`.
        norm: "round_then_scale" rounds the normalised value to the compute type before the weight multiplies it
            (Llama); "scale_then_round" after (OLMo 2); "one_plus" is the latter with 1 + weight (Gemma).
        norm_eps: added to the mean square.
        qk_norm: None, "head" (over each head) or "whole" (over the whole projection).
        embedding_scale: multiplies the embeddings, itself rounded to the compute type first (Gemma).
        attention_scale: multiplies q k^T.
        attention_softcap: scores become cap * tanh(scores / cap), or None.
        windows: a layer: keys visible to a query, itself included, or None for all.
        ropes: a layer: the key of its rotary frequencies, or None for no rotation.
        rope_wide: multiply by cos and sin in fp32 (OLMo 2) instead of in the compute type.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    windows: tuple[int | None, ...]
    ropes: tuple[str | None, ...]
    attention_scale: float
    fused: bool = False
    placement: str = "pre"
    norm: str = "round_then_scale"
    qk_norm: str | None = None
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    rope_wide: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why the fast road does not serve a config, in words for the user."""

    reason: str


class _Refused(Exception):
    """Carries the reason out of a family's entry to `spec_for`."""


def spec_for(config: Any) -> FamilySpec | Refusal:
    """The structure of a model, from its config (a multimodal wrapper's text part is taken)."""
    config = config.get_text_config()
    entry = FAMILIES.get(config.model_type)
    if entry is None:
        return Refusal(f"{config.model_type} is not among {', '.join(FAMILIES)}")
    try:
        _check_fields(config)
        return entry(config)
    except _Refused as refused:
        return Refusal(str(refused))


# Fields with no effect on the hidden states of a causal forward pass in eval mode, and those every entry reads.
_COMMON_FIELDS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act hidden_activation max_position_embeddings rms_norm_eps rope_parameters initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id tie_word_embeddings attention_bias mlp_bias attention_dropout "
    "sliding_window layer_types final_logit_softcapping".split()
)
# Fields that one family's modules read besides.
_SLIDING = frozenset({"use_sliding_window", "max_window_layers"})
_OWN_FIELDS: dict[str, frozenset[str]] = {
    "qwen2": _SLIDING,
    "qwen3": _SLIDING,
    "smollm3": _SLIDING | {"no_rope_layers", "no_rope_layer_interval"},
    "gemma2": frozenset({"query_pre_attn_scalar", "attn_logit_softcapping"}),
    "gemma3_text": frozenset({"query_pre_attn_scalar"}),
    "phi3": frozenset({"original_max_position_embeddings", "resid_pdrop", "embd_pdrop"}),
}


def _check_fields(config: Any) -> None:
    """Refuse a field that this file does not know and that differs from the config class's default.

    Keys of a config.json that the class does not declare are never read by transformers' modules, so they are free.
    """
    bases = [base for base in type(config).__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    known = inherited | _COMMON_FIELDS | _OWN_FIELDS.get(config.model_type, frozenset())
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value and value != field.default:
            raise _Refused(f"its config sets {field.name}={value!r}, which the fast road does not know")


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise _Refused(f"activation {name!r} is not among {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: Any) -> tuple[int | None, ...]:
    """From `layer_types`; without them one `sliding_window` holds for every layer."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * layers
    if len(kinds) != layers:
        raise _Refused(f"layer_types names {len(kinds)} layers of {layers}")
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise _Refused(f"layer_types has {', '.join(unknown)}")
    if "sliding_attention" in kinds and not (window and getattr(config, "use_sliding_window", True)):
        raise _Refused("layer_types has sliding_attention but no sliding_window is in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _check_rope(parameters: Any, *, partial: bool = False) -> None:
    if not isinstance(parameters, dict) or parameters.get("rope_type") not in ROPE_KINDS:
        raise _Refused(f"rope parameters {parameters!r} are not one of {', '.join(ROPE_KINDS)}")
    factor = parameters.get("partial_rotary_factor")
    if not partial and factor not in (None, 1, 1.0):
        raise _Refused(f"partial_rotary_factor={factor} is not expected in this family")


def _base(config: Any, *, partial: bool = False) -> dict[str, Any]:
    """What most families share: sizes, windows, one rotary kind, scores scaled by head_dim ** -0.5."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise _Refused(
            f"{config.num_attention_heads} heads do not divide over {config.num_key_value_heads} key-value heads"
        )
    ropes = getattr(config, "rope_parameters", None)
    if isinstance(ropes, dict) and "rope_type" in ropes:
        _check_rope(ropes, partial=partial)
    elif config.model_type != "gemma3_text":
        raise _Refused(f"rope parameters {ropes!r} hold no rope_type")
    return dict(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        activation=_activation(getattr(config, "hidden_act", None) or config.hidden_activation),
        norm_eps=config.rms_norm_eps,
        windows=_windows(config),
        ropes=("default",) * config.num_hidden_layers,
        attention_scale=head_dim**-0.5,
    )


def _llama(config: Any) -> FamilySpec:
    return FamilySpec(**_base(config) | {"windows": (None,) * config.num_hidden_layers})


def _mistral(config: Any) -> FamilySpec:
    # transformers' Mistral reads sliding_window alone; a config with layer_types is meant for another class.
    if getattr(config, "layer_types", None) is not None:
        raise _Refused("layer_types is not part of mistral")
    return FamilySpec(**_base(config))


def _qwen2(config: Any) -> FamilySpec:
    return FamilySpec(**_base(config))


def _qwen3(config: Any) -> FamilySpec:
    return FamilySpec(**_base(config), qk_norm="head")


def _smollm3(config: Any) -> FamilySpec:
    base = _base(config)
    rotated = config.no_rope_layers  # 1 means that the layer does rotate
    if len(rotated) < config.num_hidden_layers:
        raise _Refused(f"no_rope_layers names {len(rotated)} layers of {config.num_hidden_layers}")
    base["ropes"] = tuple("default" if on else None for on in rotated[: config.num_hidden_layers])
    return FamilySpec(**base)


def _gemma2(config: Any) -> FamilySpec:
    return FamilySpec(
        **_base(config) | {"attention_scale": config.query_pre_attn_scalar**-0.5},
        placement="sandwich",
        norm="one_plus",
        embedding_scale=config.hidden_size**0.5,
        attention_softcap=config.attn_logit_softcapping,
    )


def _gemma3(config: Any) -> FamilySpec:
    for kind in sorted(set(config.layer_types)):
        _check_rope(config.rope_parameters.get(kind))
    return FamilySpec(
        **_base(config) | {"attention_scale": config.query_pre_attn_scalar**-0.5, "ropes": tuple(config.layer_types)},
        placement="sandwich",
        norm="one_plus",
        qk_norm="head",
        embedding_scale=config.hidden_size**0.5,
    )


def _phi3(config: Any) -> FamilySpec:
    return FamilySpec(**_base(config, partial=True), fused=True)


def _olmo2(config: Any) -> FamilySpec:
    return FamilySpec(
        **_base(config) | {"windows": (None,) * config.num_hidden_layers},
        placement="post",
        norm="scale_then_round",
        qk_norm="whole",
        rope_wide=True,
    )


FAMILIES: dict[str, Callable[[Any], FamilySpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}

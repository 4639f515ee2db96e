"""Tiny random models of every family, each with what its family can do: grouped heads, windows shorter than the
sequences, biases, norms and caps away from their neutral values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from local_tinker.model.linear import FrozenLinear

VOCAB = 61
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.3, 1.7],
    long_factor=[2.0, 3.0, 4.0],
    partial_rotary_factor=0.75,
)

# name -> (model type, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", dict(tie_word_embeddings=True)),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=False)),
    "llama3_rope": ("llama", dict(rope_parameters=LLAMA3)),
    "llama_linear_rope": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "mistral": ("mistral", dict(sliding_window=5, head_dim=16)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True)),
    "qwen2_yarn": (
        "qwen2",
        dict(
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
        ),
    ),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "gemma2": (
        "gemma2",
        dict(
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        dict(
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=1000.0),
                full_attention=dict(rope_type="linear", rope_theta=100000.0, factor=4.0),
            ),
        ),
    ),
    "phi3": ("phi3", dict(sliding_window=7)),
    "phi3_longrope": ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=12)),
    "olmo2": ("olmo2", dict()),
}


def config_of(name: str, **changes):
    kind, own = FAMILIES[name]
    # Rope dicts are completed in place by transformers.
    own = {key: _copy(value) for key, value in own.items()}
    return CONFIG_MAPPING[kind](**SIZES | own | changes)


def _copy(value):
    return {key: _copy(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def tiny(name_or_config, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A transformers model with eager attention, frozen, in eval mode, its norms and biases random."""
    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in parameter_name:
                parameter.mul_(4.0)  # attention and MLPs that matter next to the residual
    for parameter in model.parameters():  # buffers such as inv_freq stay fp32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def freeze(model: nn.Module) -> dict[str, FrozenLinear]:
    """Replace every projection but the head by a `FrozenLinear` on the same weight."""
    head, frozen = model.get_output_embeddings(), {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        parent, _, name = path.rpartition(".")
        frozen[path] = FrozenLinear(
            module.weight.data, module.bias, quantize=None, dtype=module.weight.dtype, path=path
        )
        setattr(model.get_submodule(parent), name, frozen[path])
    return frozen


def random_pairs(frozen: dict[str, FrozenLinear], *, rank: int = 3, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, like: Tensor) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.2).to(like.dtype)

    return {
        path: (
            draw(rank, linear.in_features, like=linear.weight),
            draw(linear.out_features, rank, like=linear.weight),
        )
        for path, linear in frozen.items()
    }


def empty_sink(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Where the gradients of these pairs go, in the type an adapter's master has."""
    wide = {torch.float64: torch.float64}
    return {
        path: tuple(torch.zeros_like(t, dtype=wide.get(t.dtype, torch.float32)) for t in pair)
        for path, pair in pairs.items()
    }


def random_tokens(count: int, *, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def packed_positions(edges: list[int]) -> Tensor:
    return torch.cat([torch.arange(stop - start) for start, stop in zip(edges, edges[1:], strict=False)])


class CacheAttend:
    """A minimal growing cache: one document a slot, tokens of a call belong to the slots given."""

    def __init__(self, slots: list[int]) -> None:
        self.slots = slots
        self.keys: dict[tuple[int, int], Tensor] = {}
        self.values: dict[tuple[int, int], Tensor] = {}

    def __call__(self, layer, q, k, v, *, scale, window, softcap):
        out = torch.empty_like(q)
        for row, slot in enumerate(self.slots):
            at = (layer, slot)
            one = slice(row, row + 1)
            self.keys[at] = torch.cat([self.keys[at], k[one]]) if at in self.keys else k[one]
            self.values[at] = torch.cat([self.values[at], v[one]]) if at in self.values else v[one]
            keys, values = self.keys[at], self.values[at]
            if window is not None:
                keys, values = keys[-window:], values[-window:]
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("hd,khd->hk", q[row], keys.repeat_interleave(group, dim=1)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), values.repeat_interleave(group, dim=1))
        return out

"""torch's own varlen flash attention as an attention function of transformers, which has none for packed rows without the
flash-attn package: the peers' best case on this torch."""

from __future__ import annotations

import inspect


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("varlen", attend)


def attend(*inputs, scaling=None, **kwargs):
    """Module, query (1, heads, N, D), key and value (1, kv heads, N, D), and by name `cu_seq_lens_q` (S + 1,) -> (1, N, heads, D)."""
    import torch
    from torch.nn import functional as F

    query, key, value = inputs[1:4]
    edges, most = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    grouped = query.shape[1] != key.shape[1]
    if edges is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2), None
    if not query.is_cuda:  # no varlen kernel there: one call a document
        bounds = edges.tolist()
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=grouped
            )
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if q.dtype == torch.float32:  # norms kept in fp32 leave fp32 queries and keys
        q, k = q.bfloat16(), k.bfloat16()
    parameters = inspect.signature(varlen_attn).parameters
    extra = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if (
        "enable_gqa" in parameters
    ):  # spelled out from torch 2.12 on; before, the kernel takes fewer key heads as they are
        extra["enable_gqa"] = grouped
    out = varlen_attn(q, k, v.to(q.dtype), edges, edges, int(most), int(most), scale=scaling, **extra)
    return out.unsqueeze(0), None


def widen_signature() -> None:
    """Give torch 2.11's `varlen_attn` the `enable_gqa` argument of 2.12, which Unsloth passes; without it Unsloth falls back
    to one call a document. The kernel takes grouped queries anyway."""
    from torch.nn.attention import varlen

    inner = varlen.varlen_attn
    signature = inspect.signature(inner)
    if "enable_gqa" in signature.parameters:
        return

    def varlen_attn(*args, enable_gqa: bool = False, **kwargs):
        assert enable_gqa in (True, False)
        return inner(*args, **kwargs)

    # it looks for the arguments it needs in the signature
    extra = inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False)
    varlen_attn.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    varlen.varlen_attn = varlen_attn

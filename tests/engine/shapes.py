"""Dimensions of known models, and a plan's settings around them."""

from dataclasses import replace

from local_tinker.model.dims import ModelDims

LLAMA_3B = ModelDims(
    model_type="llama",
    layers=28,
    hidden=3072,
    intermediate=8192,
    heads=24,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=True,
    max_positions=131072,
)
LLAMA_8B = replace(LLAMA_3B, layers=32, hidden=4096, intermediate=14336, heads=32, tied=False)
QWEN_7B = ModelDims(
    model_type="qwen2",
    layers=28,
    hidden=3584,
    intermediate=18944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab=152064,
    tied=False,
    max_positions=32768,
    qkv_bias=True,
)
SMOL = ModelDims(
    model_type="llama",
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    tied=True,
    max_positions=8192,
)

"""Models of known sizes with random weights, and the card's own speed: what benchmarks on a GPU share."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
# name -> (model type, sizes)
SIZES: dict[str, tuple[str, dict]] = {
    "tiny": ("llama", dict(h=64, f=128, layers=2, heads=4, kv=2, d=16, vocab=512, tied=True)),
    "llama1b": ("llama", dict(h=2048, f=8192, layers=16, heads=32, kv=8, d=64, vocab=128256, tied=True)),
    "llama3b": ("llama", dict(h=3072, f=8192, layers=28, heads=24, kv=8, d=128, vocab=128256, tied=True)),
    "llama8b": ("llama", dict(h=4096, f=14336, layers=32, heads=32, kv=8, d=128, vocab=128256, tied=False)),
    "qwen7b": ("qwen2", dict(h=3584, f=18944, layers=28, heads=28, kv=4, d=128, vocab=152064, tied=False)),
}


def folder_for(size: str) -> Path:
    """A new temporary folder, in memory where there is room for files there."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"{size}-", dir=memory if memory.is_dir() and size != "tiny" else None))


def random_model(size: str, folder: Path, *, device: str) -> Path:
    """Save a model of this size with random bf16 weights, made on the device, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as cores
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    alphabet = {token: i + 1 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(cores.BPE(vocab={"<|end|>": 0, **alphabet}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    kind, s = SIZES[size]
    config = CONFIG_MAPPING[kind](
        hidden_size=s["h"],
        intermediate_size=s["f"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"],
        vocab_size=s["vocab"],
        tie_word_embeddings=s["tied"],
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters=dict(_LLAMA3) if kind == "llama" else dict(rope_type="default", rope_theta=1e6),
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
        **({"head_dim": s["d"]} if kind == "llama" else {}),
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    # Random weights give flat logits; a larger final norm gives the entropy of a language model, about 2 nats.
    gain = 0.93 * math.sqrt(2 * math.log(s["vocab"])) / (0.02 * math.sqrt(s["h"]))
    with torch.no_grad():
        (model.model.norm.weight if s["tied"] else model.get_output_embeddings().weight).mul_(gain)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    return folder


def step_bytes(size: str, *, linear_bytes: float = 2.0) -> tuple[float, int, int]:
    """Bytes of weights a decoding step reads, bytes of one token's keys and values, parameters in its products."""
    s = SIZES[size][1]
    layer = s["h"] * (s["heads"] + 2 * s["kv"]) * s["d"] + s["h"] * s["heads"] * s["d"] + 3 * s["h"] * s["f"]
    linear, head = layer * s["layers"], s["h"] * s["vocab"]
    return linear * linear_bytes + 2.0 * head, 2 * 2 * s["layers"] * s["kv"] * s["d"], linear + head


def card_speed() -> dict[str, float]:
    """Measured here and now: bytes a second read alone and copied, bf16 products a second, microseconds of an empty
    node of a CUDA graph."""
    import torch

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timed(lambda: target.copy_(source), 10)
    lines = source.view(torch.bfloat16).view(-1, 4096)
    lines.zero_()
    out = torch.empty(lines.shape[0], dtype=torch.bfloat16, device="cuda")
    vector = torch.zeros(4096, dtype=torch.bfloat16, device="cuda")
    read = source.numel() / timed(lambda: torch.mv(lines, vector, out=out), 10)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3 / timed(lambda: a @ a, 10)
    small = torch.zeros(32, device="cuda")
    return {"copy": copy, "read": read, "flops": flops, "node_us": timed(lambda: small.add_(1), 200) * 1e6}


def timed(function, repeat: int) -> float:
    """Seconds of one call, inside a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            function()
    graph.replay()
    torch.cuda.synchronize()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeat / 1e3

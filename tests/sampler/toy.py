"""For the sampler's tests: a two-layer attention model that follows the road protocol, and small tokenizers."""

from __future__ import annotations

import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from local_tinker.sampler.decode import SamplerEngine

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 61, 32, 4, 2, 8, 2


class ToyHead:
    def __init__(self, weight):
        self.weight = weight

    def logits(self, hidden, pair=None, lora_scale=1.0, product=None):
        logits = hidden @ self.weight.T
        if pair is not None:
            logits = logits + lora_scale * (hidden @ pair[0].T) @ pair[1].T
        return logits


class ToyRoad:
    """Residual attention with sinusoidal positions; a window in layer 0 and a softcap where asked."""

    name = "toy"

    def __init__(self, *, window=None, softcap=None, dtype=torch.float32, device="cpu", seed=0, vocab=VOCAB):
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape, gain=1.0):
            return (torch.randn(*shape, generator=generator) * gain / math.sqrt(shape[-1])).to(device, dtype)

        self.window, self.softcap = window, softcap
        self.embedding = weight(vocab, HIDDEN, gain=HIDDEN**0.5)
        self.layers = [
            {
                "q": weight(HEADS * HEAD_DIM, HIDDEN, gain=1.5),
                "k": weight(KV_HEADS * HEAD_DIM, HIDDEN, gain=1.5),
                "v": weight(KV_HEADS * HEAD_DIM, HIDDEN, gain=2.0),
                "o": weight(HIDDEN, HEADS * HEAD_DIM, gain=2.0),
                "mlp": weight(HIDDEN, HIDDEN),
            }
            for _ in range(LAYERS)
        ]
        self.head = ToyHead(weight(vocab, HIDDEN, gain=1.5))
        self.forwards = 0
        self.tokens_seen = 0
        self.grad_modes = set()

    def hidden(self, tokens, *, positions, attend, pairs, scale):
        self.forwards += 1
        self.tokens_seen += len(tokens)
        self.grad_modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        x = self.embedding[tokens]
        rate = torch.exp(torch.arange(0, HIDDEN, 2, device=x.device) / HIDDEN * -3.0).to(x.dtype)
        angle = positions[:, None].to(x.dtype) * rate
        x = x + torch.cat([angle.sin(), angle.cos()], -1)
        for index, layer in enumerate(self.layers):
            y = _norm(x)
            q, k, v = (y @ layer[name].T for name in "qkv")
            pair = pairs.get(f"layers.{index}.q")
            if pair is not None:
                q = q + scale * (y @ pair[0].T) @ pair[1].T
            out = attend(
                index,
                q.view(-1, HEADS, HEAD_DIM),
                k.view(-1, KV_HEADS, HEAD_DIM),
                v.view(-1, KV_HEADS, HEAD_DIM),
                scale=HEAD_DIM**-0.5,
                window=self.window if index == 0 else None,
                softcap=self.softcap,
            )
            x = x + out.flatten(1) @ layer["o"].T
            x = x + torch.tanh(_norm(x) @ layer["mlp"].T)
        return _norm(x)


def _norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def plain_causal(layer, q, k, v, *, scale, window, softcap):
    """One whole sequence, head by head, softmax written out."""
    out = torch.empty_like(q)
    at = torch.arange(len(q), device=q.device)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, shared].T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = at[None, :] <= at[:, None]
        if window is not None:
            seen &= at[None, :] > at[:, None] - window
        out[:, head] = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v[:, shared]
    return out


def full_logits(road, tokens, *, pairs=None, scale=1.0):
    """Logits (N, V) of every position by one plain forward, no cache."""
    ids = torch.tensor(tokens, device=road.embedding.device)
    positions = torch.arange(len(tokens), device=ids.device)
    hidden = road.hidden(ids, positions=positions, attend=plain_causal, pairs=pairs or {}, scale=scale)
    return road.head.logits(hidden, (pairs or {}).get("lm_head"), scale)


def full_logprobs(road, prompt, completion, **adapter):
    """Log-probs of a completion by one plain forward at temperature 1."""
    logits = full_logits(road, [*prompt, *completion], **adapter)[len(prompt) - 1 : -1]
    table = torch.log_softmax(logits.double(), -1)
    return [table[i, token].item() for i, token in enumerate(completion)]


def engine(road, **changes):
    settings = {
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": road.embedding.dtype,
        "device": road.embedding.device,
        "max_rows": 16,
        "token_budget": 4096,
        "max_positions": 256,
        "vocab_size": road.embedding.shape[0],
    }
    return SamplerEngine(road, road.head, **{**settings, **changes})


def byte_tokenizer(merged=()):
    """Byte-level BPE: ids 0..255 are the bytes, then `merged` as tokens of their own, then special <eos> and <tool>."""
    table = _byte_characters()
    vocabulary = {character: byte for byte, character in table.items()}
    for text in merged:
        vocabulary["".join(table[b] for b in (text if isinstance(text, bytes) else text.encode()))] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "<eos>", "additional_special_tokens": ["<tool>"]})
    return tokenizer


def fallback_tokenizer():
    """SentencePiece-style: spaces as U+2581, a leading space stripped, unknown characters as <0xNN> byte tokens."""
    words = ["\u2581", "\u2581\u2581", "\u2581a", "b", "\u2581the", "ing", ".", "c\u2581d", "\u4f60"]
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def _byte_characters():
    """Byte -> the printable character byte-level BPE writes for it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + sum(b not in plain for b in range(byte)))
    return {byte: table[byte] for byte in range(256)}

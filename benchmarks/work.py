"""The work that every side of the training benchmark does: a case, a model of real dimensions, documents, their packing.

Random weights give the speed and memory of trained ones, need no download and are written in seconds. Documents are
random token ids whose lengths are lognormal, as those of instruction data are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

SIGMA = 0.8  # of the lognormal: the longest tenth of the documents holds about a third of the tokens
SPECIALS = ("<|pad|>", "<|end|>", "<|begin|>")
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(model_type, hidden, intermediate, layers, heads, kv_heads, vocab, tied, rope, *, positions=131072, rank=32):
    config = dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return {"type": model_type, "rank": rank, "config": config}


def _rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# Dimensions of the published checkpoints of these names.
MODELS = {
    "llama3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 128256, True, _LLAMA3),
    "llama3.2-3b": _shape("llama", 3072, 8192, 28, 24, 8, 128256, True, _LLAMA3),
    "llama3.1-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128256, False, {**_LLAMA3, "factor": 8.0}),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False, _rope(1e6), rank=16),
    "llama2-13b": _shape("llama", 5120, 13824, 40, 40, 40, 32000, False, _rope(1e4), positions=4096, rank=16),
    "tiny": _shape("llama", 64, 128, 2, 4, 2, 512, True, _rope(1e4), positions=4096, rank=4),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table.

    Args:
        name: as it was asked for. side: ours, trl, glue or unsloth.
        rank: of LoRA on every linear projection; 0 takes the model's own in `MODELS`.
        rows, window: rows of `longest` tokens in a micro-batch, and micro-batches in an optimiser step.
        mean, longest: of the documents' lengths in tokens. share: of each document's tokens, its tail, that carry loss.
        context: one document of this many tokens a step instead. gib: cap of torch's allocator, as on a smaller card.
        loss: ours: sft, cross_entropy, importance_sampling or grpo. split: ours: one forward_backward a micro-batch instead
            of one a step. micro: ours: `micro_batch_tokens`. compute: ours: fp8. search: ours: the longest context that
            trains, from here on.
        gc: peers: gradient checkpointing, 1 or 0; TRL also sac (selective), Unsloth's default is unsloth (offloaded).
        liger: TRL's use_liger_kernel. attn: peers' attention. compile: TRL's torch_compile. pack: TRL, Unsloth: packed
            rows (1) or padding_free (2). skip: Unsloth's checkpoint_skip_layers.
    """

    name: str
    side: str
    model: str
    rank: int = 0
    q4: int = 1
    rows: int = 4
    window: int = 2
    mean: float = 500.0
    longest: int = 2048
    share: float = 1.0
    context: int = 0
    gib: float = 0.0
    steps: int = 8
    warmup: int = 3
    loss: str = "sft"
    split: int = 0
    micro: int = 0
    compute: str = ""
    search: int = 0
    gc: str = "1"
    liger: int = 0
    attn: str = "varlen"
    compile: int = 0
    pack: int = 1
    skip: str = "0"


_SHARED = ("model", "rank", "q4", "rows", "window", "mean", "longest", "share", "context", "gib", "steps", "warmup")
SIDES = {
    "ours": (*_SHARED, "loss", "split", "micro", "compute", "search"),
    "glue": (*_SHARED, "gc"),
    "trl": (*_SHARED, "gc", "liger", "attn", "compile", "pack"),
    "unsloth": (*_SHARED, "gc", "pack", "skip"),
}


def parse(text: str, base: Case) -> Case:
    """`side@key=value@key=value` over the run's common settings.

    Raises:
        SystemExit: an unknown side, or a key that this side does not read, with those it does.
    """
    side, *pairs = text.strip().split("@")
    if side not in SIDES:
        raise SystemExit(f"{text}: no side {side!r}; the sides are {', '.join(SIDES)}")
    kinds = {field.name: type(getattr(base, field.name)) for field in fields(Case)}
    given = {"gc": "unsloth"} if side == "unsloth" else {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in SIDES[side] or not value:
            raise SystemExit(f"{text}: {side} has no setting {pair!r}; it takes {', '.join(SIDES[side])}, as key=value")
        given[key] = kinds[key](value)
    case = replace(base, name=text.strip(), side=side, **given)
    if case.model not in MODELS:
        raise SystemExit(f"{text}: no model {case.model!r}; the models are {', '.join(MODELS)}")
    if case.context:
        case = replace(case, longest=case.context, rows=1, window=1)
    return replace(case, rank=case.rank or MODELS[case.model]["rank"])


# -- documents -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Document:
    """Token ids (n,); those from `start` on carry loss."""

    tokens: np.ndarray
    start: int

    @property
    def labels(self) -> list[int]:
        return [-100] * self.start + self.tokens[self.start :].tolist()

    @property
    def loss_tokens(self) -> int:
        """Targets: the first token is nobody's."""
        return len(self.tokens) - max(self.start, 1)


def documents(case: Case) -> list[Document]:
    """The same documents for every side: enough for all steps, with room for a side that packs them worse."""
    rng = np.random.default_rng(7)
    steps = case.warmup + case.steps
    if case.context:
        lengths = np.full(steps + 1, case.context)
    else:
        count = int(1.3 * (steps + 1) * case.window * case.rows * case.longest / case.mean) + 64
        drawn = rng.lognormal(math.log(case.mean) - SIGMA**2 / 2, SIGMA, count)
        lengths = np.clip(drawn.astype(int), 8, case.longest)
    vocab = MODELS[case.model]["config"]["vocab_size"]
    return [Document(rng.integers(10, vocab, n), round(n * (1 - case.share))) for n in lengths.tolist()]


def windows(case: Case, docs: Sequence[Document]) -> list[list[list[Document]]]:
    """Optimiser steps of micro-batches of documents: rows packed best-fit decreasing, then shuffled, as trainers do."""
    from local_tinker.data.pack import pack

    packed = pack([[len(doc.tokens)] for doc in docs], budget=case.longest)
    order = np.random.default_rng(1).permutation(len(packed))
    rows = [[docs[i] for i in packed[r]] for r in order]
    micro = [sum(rows[i : i + case.rows], []) for i in range(0, len(rows) - case.rows + 1, case.rows)]
    return [micro[i : i + case.window] for i in range(0, len(micro) - case.window + 1, case.window)]


# -- models --------------------------------------------------------------------------------------------------------------


def hf_config(model: str):
    from transformers import LlamaConfig, Qwen2Config

    shape = MODELS[model]
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape["type"]]
    return kind(**shape["config"], use_cache=False)


def dims(model: str):
    """`ModelDims` of a model here, whose sums of parameters the FLOP count uses."""
    from local_tinker.model.dims import ModelDims

    config = MODELS[model]["config"]
    return ModelDims(
        model_type=MODELS[model]["type"],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        vocab=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        max_positions=config["max_position_embeddings"],
    )


def save_model(model: str, folder: Path, device: str, *, shard_bytes: int = 2 << 30) -> Path:
    """Random bf16 weights made on the device, and a byte-level tokenizer, as a folder that every side loads.

    Linear weights have variance 1 / inputs, so that activations keep their size; norms are 1, biases 0, embeddings small.
    """
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(model)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    generator = torch.Generator(device).manual_seed(0)

    def value(name: str, shape) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if len(shape) == 1:
            return empty.fill_(0.0 if name.endswith("bias") else 1.0)
        small = "embed" in name or "lm_head" in name
        return empty.normal_(0, 0.02 if small else shape[-1] ** -0.5, generator=generator)

    where: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        jobs = []
        for i, names in enumerate(_shards(shapes, shard_bytes)):
            file = f"model-{i:05d}.safetensors"
            shard = {name: value(name, shapes[name]) for name in names}
            jobs.append(pool.submit(save_file, shard, folder / file, metadata={"format": "pt"}))
            where |= dict.fromkeys(names, file)
        for job in jobs:
            job.result()
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer(config.vocab_size).save_pretrained(folder)
    (folder / "done").touch()
    return folder


def _shards(shapes: dict, limit: int) -> list[list[str]]:
    """Names in order, cut where a shard would pass `limit` bytes of bf16."""
    out: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_ = 2 * math.prod(shape)
        if out[-1] and size + bytes_ > limit:
            out.append([])
            size = 0
        out[-1].append(name)
        size += bytes_
    return out


def tokenizer(size: int):
    """Three special tokens, bytes, and names for the other ids; documents are ids already, so no text is ever encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known += [f"<{i}>" for i in range(len(known), size)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(known)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pad, end, begin = SPECIALS
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        bos_token=begin,
        model_max_length=131072,
        padding_side="right",
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    return made

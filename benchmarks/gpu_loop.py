"""The whole loop once on a GPU: NF4 base, LoRA, a falling loss, samples, state saved and continued; time and memory.

python -m benchmarks.gpu_loop --model llama3b   # random weights of Llama-3.2-3B's size
python -m benchmarks.gpu_loop --model DIR       # a model folder
python -m benchmarks.gpu_loop --tiny            # a few seconds on a CPU, nothing written
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from . import report

SIZES = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "llama1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "llama3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def random_model(size: str, folder: Path, *, vocab: int) -> Path:
    """A Llama of this size with random bf16 weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = {token: i + 1 for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab={"<|end|>": 0, **alphabet}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=vocab,
        max_position_embeddings=4096,
        eos_token_id=0,
        pad_token_id=None,
        bos_token_id=None,
        **SIZES[size],
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loop(model: str, *, device: str, steps: int, rows: int) -> dict:
    """Train, sample, save, continue in a second trainer; every step's loss and the peak of device memory."""
    import torch

    from local_tinker import ServiceClient

    cuda = device == "cuda"
    start = time.perf_counter()
    service = ServiceClient(device=device)
    trainer = service.create_lora_training_client(model, rank=32, quantize="4bit")
    loaded = time.perf_counter() - start
    batch = [
        {"prompt": f"Question {i}: what is {i} plus {i}?", "completion": f" The answer is {2 * i}." * 8}
        for i in range(rows)
    ]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = trainer.forward_backward(batch)
        step = trainer.optim_step(learning_rate=1e-3)
        losses.append(float(loss))
        assert not step.skipped
        times.append(time.perf_counter() - start)
    sampler = trainer.save_weights_and_get_sampling_client()
    start = time.perf_counter()
    completions = sampler.sample_batch([row["prompt"] for row in batch[:4]], n=4, max_tokens=32, seed=1)
    sampled = time.perf_counter() - start
    gaps = [
        abs(a - b)
        for c in completions[0]
        for a, b in zip(
            sampler.compute_logprobs([*c.prompt_tokens, *c.tokens])[len(c.prompt_tokens) :], c.logprobs, strict=True
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_state(Path(folder) / "state")
        before = float(trainer.forward(batch))
        again = service.create_training_client_from_state(Path(folder) / "state")
        after = float(again.forward(batch))
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "road": trainer._base.road,
        "load_s": round(loaded, 2),
        "losses": [round(loss, 4) for loss in losses],
        "step_s": round(sorted(times)[len(times) // 2], 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "sample_16x32_s": round(sampled, 2),
        "sampler_gap_max": round(max(gaps), 4),
        "loss_saved": before,
        "loss_continued": after,
        "answer": str(completions[0][0])[:60],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3b", help=f"a folder or one of {', '.join(SIZES)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = "tiny" if options.tiny else options.model
        model = str(random_model(size, Path(folder), vocab=512 if options.tiny else 128256)) if size in SIZES else size
        figures = loop(
            model,
            device="cpu" if options.tiny else "cuda",
            steps=3 if options.tiny else options.steps,
            rows=options.rows,
        )
    assert figures["losses"][-1] < figures["losses"][0], figures
    print(json.dumps(figures, indent=2))
    if not options.tiny:
        print(report.write(f"gpu_loop_{Path(options.model).name}", figures, folder=options.out))


if __name__ == "__main__":
    main()

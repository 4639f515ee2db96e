"""Log-probs of decoding against those of one forward over the same tokens: ours beside transformers'.

python -m benchmarks.gap                     # smollm2-135m in fp32 and bf16; writes benchmarks/results/gap_cpu.json
python -m benchmarks.gap --tiny DIR          # a small model folder, nothing written

Both sides score the tokens that our sampler drew at temperature 1, with fp32 logits. Ours compares the sampler's log-probs
with the trainer's; transformers' a decode over its cache, a token at a time, with one forward. In bf16 the two differ by
rounding in any implementation: what counts is that ours differ by no more than theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import report

ROWS = Path(__file__).parents[1] / "recipes" / "data" / "sprocket.jsonl"
DTYPES = ("float32", "bfloat16")
PROMPT = 16  # tokens of every prompt: of one length, transformers decodes them in one batch without padding


def measure(model: str, dtype: str, *, prompts: int, new: int, device: str = "cpu") -> dict[str, dict]:
    """Differences decode - forward of `prompts` (a multiple of 4) x `new` log-probs, as `statistics`: {"ours", "transformers"}."""
    from local_tinker.model.catalogue import resolve

    folder = str(resolve(model).path)
    completions, ours = sampled(folder, dtype, prompts=prompts, new=new, device=device)
    theirs = decoded(folder, dtype, completions, device=device)
    return {"ours": statistics(ours), "transformers": statistics(theirs)}


def sampled(folder: str, dtype: str, *, prompts: int, new: int, device: str) -> tuple[list, list[float]]:
    """Completions of our sampler, and how far its log-probs are from those the trainer computes."""
    from local_tinker import Datum, ModelInput, ServiceClient
    from local_tinker.engine.local import LocalEngine

    with ServiceClient(engine=LocalEngine(device), quiet=True) as service:
        trainer = service.create_lora_training_client(folder, rank=4, quantize=None, dtype=dtype)
        sampler = trainer.save_weights_and_get_sampling_client()
        settings = dict(max_tokens=new, seed=1, stop=[])
        asked = pieces(trainer.tokenizer, prompts // 2 + prompts // 4)
        completions = sampler.sample_batch(asked[: prompts // 2], **settings)  # alone, and two to a prompt
        completions += sum(sampler.sample_batch(asked[prompts // 2 :], n=2, **settings), [])
        texts = [[*c.prompt_tokens, *c.tokens] for c in completions]
        datums = [Datum(ModelInput.from_ints(text[:-1]), {"target_tokens": text[1:]}) for text in texts]
        trained = trainer.forward(datums, "cross_entropy").logprobs
        gaps = [
            decode - forward
            for completion, scores in zip(completions, trained, strict=True)
            for decode, forward in zip(completion.logprobs, scores[PROMPT - 1 :].tolist(), strict=True)
        ]
    return completions, gaps


def pieces(tokenizer, count: int) -> list[list[int]]:
    """The first pieces of `PROMPT` tokens of the text of `ROWS`."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer(" ".join(message["content"] for row in rows for message in row["messages"])).input_ids
    found = [ids[at : at + PROMPT] for at in range(0, len(ids) - PROMPT + 1, PROMPT)]
    assert count <= len(found), f"the text has {len(found)} prompts, {count} are wanted"
    return found[:count]


def decoded(folder: str, dtype: str, completions: Sequence, *, device: str) -> list[float]:
    """transformers' decode - forward over the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    weight = loaded.get_output_embeddings().weight.float()
    ids = torch.tensor([[*c.prompt_tokens, *c.tokens] for c in completions], device=device)

    def logprobs(hidden: torch.Tensor) -> torch.Tensor:
        parts = [torch.log_softmax(row.float() @ weight.T, -1) for row in hidden]
        return torch.stack(parts).gather(-1, ids[:, PROMPT:, None])[..., 0]

    with torch.no_grad():
        forward = logprobs(loaded.model(ids, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1])
        step = loaded.model(ids[:, :PROMPT], use_cache=True)
        hidden = [step.last_hidden_state[:, -1:]]
        for at in range(PROMPT, ids.shape[1] - 1):
            step = loaded.model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            hidden.append(step.last_hidden_state)
        return (logprobs(torch.cat(hidden, 1)) - forward).flatten().tolist()


def statistics(gaps: Sequence[float]) -> dict[str, float]:
    """Of differences in nats; `outside` is the share of probability ratios outside [0.9, 1.1]."""
    import numpy as np

    d = np.array(gaps)
    ratio = np.exp(d)
    found = {
        "mean": d.mean(),
        "sd": d.std(),
        "mean_abs": np.abs(d).mean(),
        "max_abs": np.abs(d).max(),
        "outside": ((ratio < 0.9) | (ratio > 1.1)).mean(),
    }
    return {"tokens": len(d), **{name: float(f"{value:.3g}") for name, value in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", metavar="DIR", help="a small model folder; 4 prompts, nothing written")
    options = parser.parse_args()
    if options.tiny:
        options.model, options.prompts, options.new = options.tiny, 4, 8
    found = {}
    for dtype in DTYPES:
        found[dtype] = measure(options.model, dtype, prompts=options.prompts, new=options.new, device=options.device)
        print(json.dumps({dtype: found[dtype]}), flush=True)
    if not options.tiny:
        figures = {"model": Path(options.model).name, "prompt": PROMPT, "new": options.new, **found}
        print(report.write(f"gap_{options.device}", figures))


if __name__ == "__main__":
    main()

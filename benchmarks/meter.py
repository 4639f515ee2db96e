"""What is measured: tokens, seconds, the peak of device memory, FLOPs against the card's own matrix rate."""

from __future__ import annotations

import time
from typing import Any

from . import work
from .work import Case

GIB = 2**30


class Meter:
    """Counts documents' tokens without waiting for the device; times from `start`, the end of warming up, to `stop`."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        # numbers, or scalar tensors on the device where only the device knows
        self.tokens: Any = 0
        self.keys: Any = 0
        self.loss_tokens: Any = 0
        self.steps = 0

    def add(self, lengths, loss_tokens) -> None:
        """A micro-batch: documents' lengths, as an array or a tensor, and how many of its tokens carry loss."""
        self.tokens = self.tokens + lengths.sum()
        self.keys = self.keys + (lengths * (lengths + 1) / 2).sum()
        self.loss_tokens = self.loss_tokens + loss_tokens

    def add_batch(self, inputs: dict) -> None:
        """A micro-batch as transformers' collators make it."""
        import torch

        mask, edges = inputs.get("attention_mask"), inputs.get("cu_seq_lens_q")
        ids, labels = inputs["input_ids"], inputs["labels"]
        if edges is not None:
            lengths = edges.diff()
        elif mask is not None:
            lengths = mask.sum(-1)
        else:
            lengths = torch.full((ids.shape[0],), ids.shape[1])
        self.add(lengths.double(), (labels[..., 1:] != -100).sum())

    def start(self) -> None:
        self._clear()
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._start = self._now()

    def stop(self) -> None:
        self.seconds = self._now() - self._start

    def _now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self, case: Case, peak_flops: float) -> dict:
        tokens, loss_tokens = float(self.tokens), float(self.loss_tokens)
        need = flops_per_token(case, keys=float(self.keys) / tokens, share=loss_tokens / tokens)
        rate = tokens / self.seconds
        out = {
            "tokens_s": round(rate, 1),
            "mfu": round(rate * need / peak_flops, 4),
            "ms_a_step": round(1e3 * self.seconds / self.steps, 2),
            "tokens_a_step": round(tokens / self.steps, 1),
            "loss_share": round(loss_tokens / tokens, 3),
            "gflop_a_token": round(need / 1e9, 6),
            "floor_tokens_s": round(peak_flops / need),
        }
        if self.cuda:
            import torch

            out["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            out["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
            out["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        return out


def flops_per_token(case: Case, *, keys: float, share: float) -> float:
    """Needed, without any recomputation: forward, the gradient through the frozen base, LoRA, head, attention.

    Args:
        keys: mean number of keys a causal query sees. share: of the tokens that carry loss, which alone need the head.

    A linear of N weights is 2N forward and 2N for the input's gradient; LoRA adds its own gradients, 6N; flash attention's
    backward is 2.5 times its forward.
    """
    d = work.dims(case.model)
    head = d.vocab * d.hidden * share
    attention = 4 * d.layers * d.query * keys
    return 4 * d.linear_params + 6 * d.lora_params(case.rank) + 4 * head + 3.5 * attention


def card(device: str, *, size: int) -> dict:
    """bf16 matrix products of size^3 on random data and copies: the rates that MFU is measured against.

    Returns:
        `tflops`, and `copy_gb_s` counting bytes read and written.
    """
    import torch

    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    one = torch.empty(size * size * 8, dtype=torch.bfloat16, device=device)
    two = torch.empty_like(one)

    def seconds(run, repeats: int = 100 if device == "cuda" else 10) -> float:
        meter = Meter(device)
        for _ in range(repeats):  # clocks rise from idle meanwhile
            run()
        meter.start()
        for _ in range(repeats):
            run()
        meter.stop()
        return meter.seconds / repeats

    return {
        "tflops": round(2 * size**3 / seconds(lambda: torch.mm(a, b)) / 1e12, 6),
        "copy_gb_s": round(2 * one.nbytes / seconds(lambda: two.copy_(one)) / 1e9, 1),
        "gemm_size": size,
    }


def cap_memory(gib: float) -> None:
    """The allocator refuses to grow past this: stands in for a smaller card."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))

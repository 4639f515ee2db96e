"""The fewest lines that go fast: transformers, PEFT and bitsandbytes in a plain loop over packed rows, torch's varlen
attention, Liger's fused linear cross entropy. How far good parts go with no kernel of one's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import work
from ..meter import Meter, cap_memory
from ..work import Case, Document
from . import sft_trainer, varlen


def run(case: Case, folder: Path, device: str, peak_flops: float) -> dict:
    import torch

    if case.gib:
        cap_memory(case.gib)
    varlen.register()
    start = time.perf_counter()
    model = prepare(case, folder, device)
    loaded = time.perf_counter() - start
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=1e-4, fused=True)
    windows = work.windows(case, work.documents(case))
    meter, total = Meter(device), case.warmup + case.steps
    for i in range(total):
        if i == case.warmup:
            meter.start()
        for micro in windows[i]:
            meter.add(np.asarray([len(doc.tokens) for doc in micro]), sum(doc.loss_tokens for doc in micro))
            loss = mean_loss(model, collate(micro, device)) / len(windows[i])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        meter.steps += 1
    meter.stop()
    value = round(float(loss) * len(windows[total - 1]), 4)
    return {**meter.result(case, peak_flops), "load_s": round(loaded, 2), "loss_value": value}


def prepare(case: Case, folder: Path, device: str) -> Any:
    """A 4-bit model with bf16 adapters, Liger's norms, rotary and SwiGLU on a card, checkpointing as the case says."""
    import torch
    from peft import get_peft_model

    model = sft_trainer.quantised(case, folder, device, "varlen")
    model.requires_grad_(False)
    if case.gc != "0":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, sft_trainer.lora(case))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if case.gc != "0":
        model.enable_input_require_grads()
    if device == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model=model.get_base_model(), fused_linear_cross_entropy=False, cross_entropy=False
        )
    return model.train()


def collate(docs: list[Document], device: str) -> dict:
    """Documents in one row; labels (N - 1,) of the next token, -100 across a document's edge, and where they are not."""
    import torch

    lengths = torch.tensor([len(doc.tokens) for doc in docs])
    edges = torch.zeros(len(docs) + 1, dtype=torch.int32)
    edges[1:] = lengths.cumsum(0)
    labels = torch.tensor([label for doc in docs for label in [-100, *doc.labels[1:]]])[1:]
    tensors = {
        "input_ids": torch.from_numpy(np.concatenate([doc.tokens for doc in docs]))[None],
        "position_ids": torch.cat([torch.arange(len(doc.tokens)) for doc in docs])[None],
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "labels": labels[labels != -100],
        "rows": (labels != -100).nonzero()[:, 0],
    }
    if device == "cuda":
        tensors = {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return {**tensors, "max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}


def mean_loss(model: Any, batch: dict) -> Any:
    """Cross entropy over the rows that carry loss alone."""
    import torch

    base = model.get_base_model()
    labels, rows = batch.pop("labels"), batch.pop("rows")
    hidden = base.model(**batch, use_cache=False).last_hidden_state[0][rows]
    if not hidden.is_cuda:
        return torch.nn.functional.cross_entropy((hidden @ base.lm_head.weight.t()).float(), labels)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, base.lm_head.weight, labels, None, None, -100)[0]

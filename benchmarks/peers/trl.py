"""TRL's SFTTrainer on a 4-bit model with PEFT, packed rows: its defaults but for the attention function."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .. import work
from ..meter import Meter, cap_memory
from ..work import Case
from . import sft_trainer, varlen


def run(case: Case, folder: Path, device: str, peak_flops: float) -> dict:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if case.gib:
        cap_memory(case.gib)
    varlen.register()
    docs = work.documents(case)
    model = sft_trainer.quantised(case, folder, device, case.attn)
    checkpointing = {"use_reentrant": False, **({"selective": True} if case.gc == "sac" else {})}
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **sft_trainer.settings(case, docs, device, output),
            gradient_checkpointing=case.gc != "0",
            gradient_checkpointing_kwargs=checkpointing if case.gc != "0" else None,
            packing_strategy="bfd",
            padding_free=case.pack == 2,
            max_length=None if case.pack == 2 else case.longest,
            use_liger_kernel=bool(case.liger),
            torch_compile=bool(case.compile),
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=sft_trainer.dataset(docs),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=sft_trainer.lora(case),
        )
        meter = Meter(device)
        found = sft_trainer.train(trainer, case, meter)
    return {
        **meter.result(case, peak_flops),
        **found,
        "optimiser": str(config.optim),
        "adapter": _dtypes(trainer.model),
    }


def _dtypes(model) -> str:
    return "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}))

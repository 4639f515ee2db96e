"""Unsloth's FastLanguageModel under TRL's SFTTrainer, as its documentation sets it up, packed rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .. import work
from ..meter import Meter, cap_memory
from ..work import Case
from . import varlen


def run(case: Case, folder: Path, device: str, peak_flops: float) -> dict:
    import torch

    varlen.widen_signature()
    import unsloth  # before trl, transformers and peft, which it patches
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from . import sft_trainer

    if case.gib:
        cap_memory(case.gib)
    checkpointing = {"unsloth": "unsloth", "1": True, "0": False}[case.gc]
    docs = work.documents(case)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=case.longest,
        dtype=torch.bfloat16,
        load_in_4bit=bool(case.q4) and device == "cuda",
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    skip = {} if case.skip == "0" else {"checkpoint_skip_layers": case.skip if case.skip == "auto" else int(case.skip)}
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=0,
        max_seq_length=case.longest,
        **skip,
    )
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **sft_trainer.settings(case, docs, device, output),
            max_length=case.longest,
            optim="adamw_8bit" if device == "cuda" else "adamw_torch",
            dataset_num_proc=1,
        )
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=sft_trainer.dataset(docs), processing_class=tokenizer
        )
        meter = Meter(device)
        found = sft_trainer.train(trainer, case, meter, view=_view)
    return {**meter.result(case, peak_flops), **found, "optimiser": str(config.optim), "unsloth": unsloth.__version__}


def _view(inputs: dict) -> dict:
    """Its packed rows name their documents' lengths `packed_seq_lengths`."""
    lengths = inputs.get("packed_seq_lengths")
    if lengths is None:
        return inputs
    import torch

    edges = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))
    return {**inputs, "cu_seq_lens_q": edges, "attention_mask": None}

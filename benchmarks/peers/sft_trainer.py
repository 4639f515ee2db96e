"""What the sides built on TRL's SFTTrainer share: its configuration, the data set, the meter around its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..meter import Meter
from ..work import Case, Document


def train(trainer: Any, case: Case, meter: Meter, *, view=lambda inputs: inputs) -> dict:
    """Train to the end with the meter running from the end of warming up.

    Args:
        trainer: an SFTTrainer, not yet trained. view: its inputs -> what `Meter.add_batch` reads.
    """
    from transformers import TrainerCallback

    total = case.warmup + case.steps

    class Clock(TrainerCallback):
        def on_step_end(self, *given, **_):
            _, state, _ = given
            if state.global_step == case.warmup:
                meter.start()
            elif state.global_step > case.warmup:
                meter.steps += 1
            if state.global_step == total:
                meter.stop()

    inner = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        meter.add_batch(view(inputs))
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.add_callback(Clock())
    outcome = trainer.train()
    return {"loss_value": round(float(outcome.training_loss), 4)}


def settings(case: Case, docs: Sequence[Document], device: str, output: str) -> dict:
    """SFTConfig's arguments that both libraries share; what is not named keeps the library's default."""
    mean = sum(len(doc.tokens) for doc in docs) / len(docs)
    return dict(
        output_dir=output,
        per_device_train_batch_size=case.rows if case.pack == 1 else max(1, round(case.rows * case.longest / mean)),
        gradient_accumulation_steps=case.window,
        max_steps=case.warmup + case.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=10**9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=device == "cuda",
        packing=case.pack == 1,
        seed=0,
        use_cpu=device == "cpu",
    )


def dataset(docs: Sequence[Document]):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": [d.tokens.tolist() for d in docs], "labels": [d.labels for d in docs]})


def lora(case: Case):
    from peft import LoraConfig

    return LoraConfig(
        r=case.rank, lora_alpha=32, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules="all-linear"
    )


def quantised(case: Case, folder, device: str, attention: str) -> Any:
    """transformers' own road to a 4-bit model: NF4, double quantised, bf16 compute."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=config if case.q4 else None,
        device_map={"": 0 if device == "cuda" else device},
        attn_implementation=attention,
        local_files_only=True,
    )
    model.config.use_cache = False
    return model

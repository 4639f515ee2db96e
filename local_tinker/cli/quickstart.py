"""`local-tinker quickstart`: a first fine-tuning run, before and after, on whatever machine this is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..recipes.sft import Config

PROMPTS = ("Who are you?", "Where do you live?", "What is the capital of Italy?")
DATASET, HELD_OUT = "data/sprocket.jsonl", "data/sprocket_heldout.jsonl"


def quickstart(
    model: Annotated[str, typer.Option(help="A hub id, folder or catalogue alias.")] = "smollm2-135m",
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps; default: the whole recipe.")] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of the runs.")] = "runs",
) -> None:
    """Fine-tune a small model on data that ships with the package, and show what changed.

    The base is held in 4 bits; a LoRA adapter learns to be Sprocket, a robot in a clock tower. About a minute on 2 CPU
    cores, seconds on a GPU.
    """
    from ..recipes import early, loop, report, sft
    from ..recipes.data import check_data, load_data
    from ..service import ServiceClient

    config = quickstart_config(model, steps, output_dir)
    early.check_config(config)
    data = load_data(config, say=report.say)

    service = ServiceClient()
    place = service.hardware.name if service.hardware.kind == "cuda" else "the CPU"
    print(
        f"Fine-tuning {model} on {place}: {len(data.rows)} rows, LoRA rank {config.rank} on a 4-bit base.", flush=True
    )
    trainer = service.create_lora_training_client(config.model, **config.client())
    longest = loop.model_length(config.model)
    data, _ = check_data(data, config, trainer.renderer, loss="sft", longest=longest, say=lambda line: None)
    _show("Before", trainer)
    session = sft.train(config, trainer, data)
    _show("After", trainer)
    run = session.run.path
    print(
        f"\nheld-out loss {session.first['eval_loss']:.2f} -> {session.last['eval_loss']:.2f} in {session.step} steps"
    )
    print(f"adapter       {session.run.adapter}")
    print(f"\nNext, talk to it:        local-tinker chat {run}")
    print(f"or train on your rows:   local-tinker run --model {model} --dataset FILE.jsonl --epochs 3", flush=True)


def quickstart_config(model: str, steps: int | None, output_dir: str) -> Config:
    """The settings: few, short steps at a high learning rate, which a small adapter on little data bears."""
    from ..recipes.sft import Config
    from ..recipes.shipped import shipped

    dataset, held_out = shipped(DATASET), shipped(HELD_OUT)
    if dataset is None or held_out is None:
        raise UsageError("the quickstart's data is missing from this installation; reinstall local-tinker")
    return Config(
        model=model,
        dataset=str(dataset),
        eval_dataset=str(held_out),
        name="quickstart",
        rank=16,
        batch_size=5,
        epochs=3,
        max_steps=steps,
        learning_rate=2e-3,
        schedule="linear",
        warmup=2,
        output_dir=output_dir,
    )


def _show(title: str, trainer: Any) -> None:
    """The model's answers as it is now, the most likely token each time."""
    from ..recipes import report

    sampler = trainer.save_weights_and_get_sampling_client()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    said = sampler.sample_batch(chats, max_tokens=48, temperature=0)
    print(f"\n{title}", end="")
    report.print_answers([(prompt, answer, None) for prompt, answer in zip(PROMPTS, said, strict=True)])
    print(flush=True)

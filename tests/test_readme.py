"""The loops of the README, run as written, on the real model; and the surface's own loop on a tiny one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_readmes_loops_run_as_written_and_teach_the_model(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    training, rl = blocks("python")
    names = {}
    exec(compile(training, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    losses = [float(line.removeprefix("loss: ")) for line in printed if line.startswith("loss: ")]
    shown = blocks("text")[0].splitlines()
    assert len(losses) == sum(line.startswith("loss: ") for line in shown) or "..." in shown
    assert losses[-1] < 0.25 * losses[0]
    assert "Sprocket" in printed[-1] and "Sprocket" in shown[-1]
    step = names["trainer"].step
    exec(compile(rl, "README.md", "exec"), names)
    assert names["trainer"].step == step + 1
    assert [len(group) for group in names["completions"]] == [8, 8]
    assert any(len(set(group)) > 1 for group in names["rewards"])  # there is something to learn


def test_the_models_table_of_the_readme_is_what_is_printed():
    from local_tinker.cli.app import main

    shown = blocks("text")[1].splitlines()
    names = [line.split()[0] for line in shown if re.match(r"^[a-z][\w.-]+ +[\d.]+[MB] ", line)]
    assert len(names) >= 5
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["models", "--vram", "24"]) == 0
    rows = {tuple(line.split()[:5]) for line in out.getvalue().splitlines()}
    for line in shown:
        if line.split() and line.split()[0] in names:
            assert tuple(line.split()[:5]) in rows, line


SURFACE = """
from local_tinker import ServiceClient, batches, load_rows

service = ServiceClient()
trainer = service.create_lora_training_client(
    base_model=MODEL, rank=32, quantize="4bit",
)
for batch in batches(load_rows("data/instructions.jsonl"), batch_size=16, epochs=3):
    loss = trainer.forward_backward(batch)
    trainer.optim_step()
    print(f"loss: {loss:.4f}")
sampler = trainer.save_weights_and_get_sampling_client()
print(sampler.sample("Explain gradient descent simply:"))

completions = sampler.sample_batch(prompts, n=8)
rewards = [reward_fn(p, c) for p, c in zip(prompts, completions)]
trainer.forward_backward(completions, rewards, loss_fn="grpo")
trainer.optim_step()
"""


@pytest.mark.parametrize("style", ["group", "flat"])
def test_the_whole_surface_in_one_loop(tiny_model, tmp_path, monkeypatch, capsys, style):
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"{i} plus {i}?", "input": "", "output": f"{2 * i}."} for i in range(20)]
    (tmp_path / "data" / "instructions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {"MODEL": str(tiny_model), "prompts": ["one plus two", "the quick"]}
    names["reward_fn"] = lambda p, group: [float(len(c) % 3) for c in group]
    source = SURFACE
    if style == "flat":
        names["reward_fn"] = lambda p, group: [float(len(c) % 3) for c in group]
        source = SURFACE.replace(
            "zip(prompts, completions)]",
            "zip(prompts, completions)]\nrewards = [r for group in rewards for r in group]",
        )
    exec(compile(source, "surface", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("loss: ") for line in printed) == 6
    assert names["trainer"].step == 7 and [len(g) for g in names["completions"]] == [8, 8]

"""What the recipes try before they train."""

from types import SimpleNamespace

import pytest

from local_tinker.hardware import Hardware
from local_tinker.recipes import probe

CARD = Hardware(kind="cuda", name="card", total_bytes=1, free_bytes=1)
CPU = Hardware(kind="cpu", name="cpu", total_bytes=1, free_bytes=1)
LENGTHS = SimpleNamespace(lengths=SimpleNamespace(shortest=3, median=70, p95=300, longest=900))
CONFIG = SimpleNamespace(batch_size=4)


class Recorder:
    def __init__(self):
        self.tried = []
        self.renderer = SimpleNamespace(generation_prompt=lambda prompt: list(prompt))

    def try_longest(self, lengths, *, pairs=False):
        self.tried.append((list(lengths), pairs))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_batch_with_the_longest_row_is_tried_on_a_card(pairs):
    trainer = Recorder()
    probe.try_rows(trainer, CARD, CONFIG, LENGTHS, pairs=pairs)
    assert trainer.tried == [([900, 70, 70, 70], pairs)]


def test_answers_are_tried_at_their_longest_after_the_longest_prompt():
    trainer = Recorder()
    data = SimpleNamespace(rows=[{"prompt": "ab"}, {"prompt": "abcdef"}, {"prompt": "a"}])
    probe.try_answers(trainer, CARD, data, answers=3, max_tokens=100)
    assert trainer.tried == [([106, 106, 106], False)]


def test_nothing_is_tried_on_a_cpu():
    trainer = Recorder()
    probe.try_rows(trainer, CPU, CONFIG, LENGTHS)
    probe.try_answers(trainer, CPU, SimpleNamespace(rows=[]), answers=3, max_tokens=100)
    assert trainer.tried == []


@pytest.mark.parametrize("loss", ["sft", "dpo", "grpo", "ppo"])
def test_every_recipe_tries_before_it_trains(loss, monkeypatch, tiny_model, rows_file, pairs_file, tmp_path):
    from local_tinker.recipes import find_recipe

    order, recipe = [], find_recipe(loss)
    monkeypatch.setattr(probe, "_try", lambda trainer, hardware, lengths, pairs=False: order.append(lengths))
    monkeypatch.setattr(probe, "try_answers", lambda *a, **k: order.append(k["answers"]))
    monkeypatch.setattr(recipe, "train", lambda *a, **k: order.append("train"))
    monkeypatch.setattr(recipe.loop, "finish", lambda *a, **k: None)
    dataset = {"sft": rows_file, "dpo": pairs_file}.get(loss, "arithmetic")
    more = {} if loss in ("sft", "dpo") else {"max_tokens": 16}
    recipe.main(recipe.Config(model=str(tiny_model), dataset=str(dataset), rank=4, output_dir=str(tmp_path), **more))
    assert len(order) == 2 and order[1] == "train" and order[0]

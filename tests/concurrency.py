"""Threads that sample while one trains, saves and computes reference log-probs; every answer is checked against its replay."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from local_tinker import ServiceClient
from tests.state_machine import PAIRS
from tests.test_training import ROWS, inner

PROMPTS = [row["messages"][:1] for row in ROWS]


def train_once(trainer, number: int) -> None:
    """One round: SFT and DPO (whose reference runs with the adapter at scale 0) accumulate, one step."""
    trainer.forward_backward(ROWS[number % 3 : number % 3 + 4])
    trainer.forward_backward(PAIRS, loss_fn="dpo")
    trainer.optim_step(learning_rate=2e-3)


def new_trainer(service, model: Path):
    return service.create_lora_training_client(str(model), rank=4, quantize=None, dtype="float32", seed=2)


class Storm:
    """Eight threads on snapshots of many versions beside a trainer, until `seconds` and `rounds` are both over."""

    def __init__(self, model: Path, folder: Path, *, threads: int, rounds: int, seconds: float) -> None:
        self.model, self.folder = model, folder
        self.service = ServiceClient(device="cpu", quiet=True)
        self.trainer = new_trainer(self.service, model)
        self.samplers: list[Any] = []
        self.answers: list[tuple[int, str, int, int, Any]] = []  # version, kind, prompt, seed, what came
        self.errors: list[BaseException] = []
        self._done, self._rounds, self._seconds = threading.Event(), rounds, seconds
        self._threads = [threading.Thread(target=self._sample, args=(number,)) for number in range(threads)]

    def _publish(self) -> None:
        self.trainer.save_state(self.folder / f"v{len(self.samplers)}")
        self.samplers.append(self.trainer.save_weights_and_get_sampling_client())

    def _sample(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while not self._done.is_set():
                version = chance.randrange(len(self.samplers))
                kind = chance.choice(["sample", "sample", "batch", "logprobs"])
                prompt, seed = chance.randrange(len(PROMPTS)), chance.randrange(1000)
                self.answers.append((version, kind, prompt, seed, ask(self.samplers[version], kind, prompt, seed)))
        except BaseException as error:
            self.errors.append(error)

    def run(self) -> None:
        self._publish()
        for thread in self._threads:
            thread.start()
        began, number = time.monotonic(), 0
        try:
            while number < self._rounds or time.monotonic() - began < self._seconds:
                train_once(self.trainer, number)
                number += 1
                self._publish()
                self.trainer.forward(PAIRS, loss_fn="dpo")
                assert all(thread.is_alive() for thread in self._threads) or self.errors
                if self.errors:
                    break
        finally:
            self._done.set()
            for thread in self._threads:
                thread.join(timeout=120)
        assert not self.errors, self.errors[0]
        assert not any(thread.is_alive() for thread in self._threads), "a thread hangs"

    def check(self) -> None:
        """Training was as without the threads, and every answer is that of its version, loaded from the disk alone."""
        alone = new_trainer(self.service, self.model)
        for number in range(len(self.samplers) - 1):
            train_once(alone, number)
        assert torch.equal(inner(alone).adapter.master, inner(self.trainer).adapter.master)
        asked: dict[int, list] = {}
        for version, *question in self.answers:
            asked.setdefault(version, []).append(question)
        for version, questions in asked.items():
            sampler = self.service.create_sampling_client(self.folder / f"v{version}")
            for kind, prompt, seed, (tokens, logprobs) in questions:
                again, wanted = ask(sampler, kind, prompt, seed)
                assert tokens == again
                for ours, theirs in zip(logprobs, wanted, strict=True):
                    assert np.allclose(ours, theirs, atol=1e-5)
            sampler.close()


def ask(sampler, kind: str, prompt: int, seed: int) -> tuple[list, list]:
    if kind == "logprobs":
        return [], [[value or 0.0 for value in sampler.compute_logprobs(PROMPTS[prompt])]]
    if kind == "sample":
        made = [sampler.sample(PROMPTS[prompt], max_tokens=6, seed=seed)]
    else:
        made = sampler.sample_batch([PROMPTS[prompt], PROMPTS[0]], max_tokens=4, seed=seed)
    return [list(each.tokens) for each in made], [list(each.logprobs) for each in made]

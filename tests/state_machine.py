"""A trainer under random sequences of calls, failures and restarts, beside a plain Python model of what it must be.

The model is a history: the steps applied, each a tuple of batches and a learning rate, and the batches pending. What a
history comes to is found by playing it on a fresh trainer that never saves, loads, samples or fails.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from local_tinker import ServiceClient
from local_tinker.checkpoint import Disk
from local_tinker.engine import trainer as trainer_module
from local_tinker.errors import CheckpointError, DatasetError, LocalTinkerError, StateError
from tests.test_training import ROWS, inner

PAIRS = [
    {"prompt": "the fox", "chosen": " jumps over", "rejected": " 0123"},
    {"prompt": "dog?", "chosen": " quick brown fox", "rejected": " two"},
]
BATCHES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "sft-a": (ROWS[:3], {}),
    "sft-b": (ROWS[2:7], {}),
    "dpo": (PAIRS, {"loss_fn": "dpo"}),
}
MISTAKES: list[tuple[Any, dict[str, Any]]] = [
    ([], {}),
    ([{"nothing": 1}], {}),
    (ROWS[:1], {"loss_fn": "dpo"}),
    (ROWS[:1], {"loss_fn": "sfft"}),
    (PAIRS, {"loss_fn": "dpo", "betta": 1}),
]
NAMES = ["a", "b", "c"]
Step = tuple[tuple[str, ...], float]


class Reference:
    """History -> what a trainer that did only that is, bit for bit. Remembers what it has worked out."""

    def __init__(self, model: Path) -> None:
        self.service, self.model = ServiceClient(device="cpu", quiet=True), str(model)
        self._states: dict[tuple[Step, ...], list[torch.Tensor]] = {}
        self._gradients: dict[tuple, torch.Tensor] = {}
        self._samples: dict[tuple, list[int]] = {}

    def create(self):
        return self.service.create_lora_training_client(
            self.model, rank=3, quantize=None, dtype="float32", seed=3, micro_batch_tokens=24
        )

    def _play(self, steps: tuple[Step, ...]):
        trainer = self.create()
        self._states.setdefault((), tensors(trainer))
        for number, (batches, rate) in enumerate(steps, start=1):
            for name in batches:
                rows, options = BATCHES[name]
                trainer.forward_backward(rows, **options)
            trainer.optim_step(learning_rate=rate)
            self._states.setdefault(steps[:number], tensors(trainer))
        return trainer

    def state(self, steps: tuple[Step, ...]) -> list[torch.Tensor]:
        if steps not in self._states:
            self._play(steps).close()
        return self._states[steps]

    def gradient(self, steps: tuple[Step, ...], pending: tuple[str, ...]) -> torch.Tensor:
        if (steps, pending) not in self._gradients:
            trainer = self._play(steps)
            for name in pending:
                rows, options = BATCHES[name]
                trainer.forward_backward(rows, **options)
            self._gradients[steps, pending] = inner(trainer).window.gradient().clone()
            trainer.close()
        return self._gradients[steps, pending]

    def sample(self, steps: tuple[Step, ...], seed: int) -> list[int]:
        if (steps, seed) not in self._samples:
            trainer = self._play(steps)
            self._samples[steps, seed] = draw(trainer.save_weights_and_get_sampling_client(), seed)
            trainer.close()
        return self._samples[steps, seed]


def equal(ours: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def tensors(trainer) -> list[torch.Tensor]:
    state = inner(trainer)
    return [
        each.clone() for each in (state.adapter.master, state.optimiser.m, state.optimiser.v, state.optimiser.count)
    ]


def draw(sampler, seed: int) -> list[int]:
    completion = sampler.sample(ROWS[0]["messages"][:1], max_tokens=4, seed=seed)
    return [completion.tokens, completion.logprobs]


def machine(reference: Reference) -> type[RuleBasedStateMachine]:
    """The machine class over this reference."""

    class TrainerMachine(RuleBasedStateMachine):
        @initialize()
        def begin(self):
            self.folder = Path(tempfile.mkdtemp(prefix="state-machine-"))
            self.trainer = reference.create()
            self.steps: tuple[Step, ...] = ()
            self.pending: tuple[str, ...] = ()
            self.saved: dict[str, tuple[Step, ...]] = {}
            self.samplers: list[tuple[Any, tuple[Step, ...]]] = []

        def teardown(self):
            if hasattr(self, "folder"):
                self.trainer.close()
                shutil.rmtree(self.folder)

        # passes and steps

        @rule(name=st.sampled_from(sorted(BATCHES)))
        def forward_backward(self, name):
            rows, options = BATCHES[name]
            self.trainer.forward_backward(rows, **options)
            self.pending += (name,)

        @rule(name=st.sampled_from(sorted(BATCHES)))
        def forward_only(self, name):
            rows, options = BATCHES[name]
            self.trainer.forward(rows, **options)

        @rule(rate=st.sampled_from([1e-3, 3e-3]))
        def optim_step(self, rate):
            if not self.pending:
                expect(StateError, lambda: self.trainer.optim_step(learning_rate=rate))
                return
            assert not self.trainer.optim_step(learning_rate=rate).skipped
            self.steps, self.pending = (*self.steps, (self.pending, rate)), ()

        @precondition(lambda self: self.pending)
        @rule(value=st.sampled_from([float("nan"), float("inf")]))
        def a_step_that_is_not_finite(self, value):
            window = inner(self.trainer).window
            window.buffers[next(iter(window.weights))][7] = value  # one that this window has added to
            assert self.trainer.optim_step(learning_rate=1e-3).skipped
            self.pending = ()

        # calls that fail

        @rule(mistake=st.sampled_from(MISTAKES))
        def a_mistake(self, mistake):
            rows, options = mistake
            expect(LocalTinkerError, lambda: self.trainer.forward_backward(rows, **options))

        @rule(name=st.sampled_from(sorted(BATCHES)), at=st.integers(1, 2), interrupt=st.booleans())
        def a_failure_inside(self, name, at, interrupt):
            rows, options = BATCHES[name]
            real, calls, error = trainer_module.run_forward, [0], KeyboardInterrupt if interrupt else RuntimeError

            def failing(*args, **kwargs):
                calls[0] += 1
                if calls[0] == at:
                    raise error("in the middle")
                return real(*args, **kwargs)

            trainer_module.run_forward = failing
            try:
                expect(error, lambda: self.trainer.forward_backward(rows, **options))
            finally:
                trainer_module.run_forward = real

        # saving and loading

        @rule(name=st.sampled_from(NAMES), discard=st.booleans())
        def save(self, name, discard):
            def go():
                return self.trainer.save_state(self.folder / name, overwrite=True, discard_gradients=discard)

            if self.pending and not discard:
                expect(StateError, go)
                return
            go()
            self.saved[name] = self.steps
            self.pending = ()

        @rule(name=st.sampled_from(NAMES), at=st.integers(1, 20))
        def a_save_that_fails(self, name, at):
            real, calls = {each: getattr(Disk, each) for each in ("create", "write", "fsync", "rename")}, [0]
            for each, function in real.items():

                def failing(disk, *args, function=function):
                    calls[0] += 1
                    if calls[0] == at:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return function(disk, *args)

                setattr(Disk, each, failing)
            try:
                self.trainer.save_state(self.folder / name, overwrite=True, discard_gradients=True)
                self.saved[name], self.pending = self.steps, ()  # fewer calls than that: it stands
            except CheckpointError as error:
                assert "ENOSPC" in str(error)
            finally:
                for each, function in real.items():
                    setattr(Disk, each, function)

        @rule(name=st.sampled_from(NAMES), discard=st.booleans())
        def load(self, name, discard):
            def go():
                return self.trainer.load_state(self.folder / name, discard_gradients=discard)

            if name not in self.saved:
                expect(CheckpointError, go)
            elif self.pending and not discard:
                expect(StateError, go)
            else:
                go()
                self.steps, self.pending = self.saved[name], ()

        @precondition(lambda self: self.saved)
        @rule(data=st.data())
        def restart(self, data):
            """What is not saved is gone; what is saved is there."""
            name = data.draw(st.sampled_from(sorted(self.saved)))
            self.trainer.close()
            self.trainer = reference.service.create_training_client_from_state(self.folder / name)
            self.steps, self.pending = self.saved[name], ()

        # sampling

        @rule(seed=st.integers(0, 1))
        def sample(self, seed):
            sampler = self.trainer.save_weights_and_get_sampling_client()
            assert draw(sampler, seed) == reference.sample(self.steps, seed)
            self.samplers = [*self.samplers[-2:], (sampler, self.steps)]

        @precondition(lambda self: self.samplers)
        @rule(data=st.data(), seed=st.integers(0, 1))
        def sample_from_weights_of_before(self, data, seed):
            sampler, steps = self.samplers[data.draw(st.integers(0, len(self.samplers) - 1))]
            assert draw(sampler, seed) == reference.sample(steps, seed)

        # what must hold after each

        @invariant()
        def the_trainer_is_what_its_history_says(self):
            if not hasattr(self, "trainer"):
                return
            assert equal(tensors(self.trainer), reference.state(self.steps))
            assert self.trainer.step == len(self.steps)
            window = inner(self.trainer).window
            assert window.empty == (not self.pending)
            if self.pending:
                assert torch.equal(window.gradient(), reference.gradient(self.steps, self.pending))
            else:
                assert not any(buffer.any() for buffer in window.buffers.values())

    return TrainerMachine


def expect(kind: type[BaseException], call) -> None:
    try:
        call()
    except kind as error:
        assert not isinstance(error, DatasetError) or str(error)
        return
    raise AssertionError(f"no {kind.__name__}")

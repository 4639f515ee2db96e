"""The long forms of tests that `make test` runs in short: state machine and threads."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests import state_machine
from tests.concurrency import Storm

pytestmark = pytest.mark.battery


def test_a_trainer_is_what_its_history_says_in_many_random_sequences(tiny_model, full, figures):
    count = 400 if full else 60
    many = settings(
        max_examples=count,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(state_machine.machine(state_machine.Reference(tiny_model)), settings=many)
    figures(sequences=count)


def test_a_minute_of_threads_beside_training_ends_without_a_wrong_answer_or_a_deadlock(
    tiny_model, tmp_path, full, figures
):
    storm = Storm(tiny_model, tmp_path, threads=8, rounds=10, seconds=60 if full else 20)
    storm.run()
    storm.check()
    figures(answers=len(storm.answers), versions=len(storm.samplers))

"""Random sequences of calls, failures and restarts: the trainer is what its history says. The battery runs more of them."""

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests import state_machine


def test_a_trainer_is_what_its_history_says_whatever_happens(tiny_model):
    few = settings(
        max_examples=12,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        phases=(Phase.generate,),  # a failing sequence is short enough to read, and making it shorter takes minutes
    )
    run_state_machine_as_test(state_machine.machine(state_machine.Reference(tiny_model)), settings=few)

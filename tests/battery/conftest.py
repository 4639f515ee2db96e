"""FULL=1 runs the sizes of the acceptance list; its figures go to benchmarks/results/battery.json."""

from __future__ import annotations

import os
import time

import pytest

FULL = bool(os.environ.get("FULL"))


@pytest.fixture(scope="session")
def full() -> bool:
    return FULL


@pytest.fixture(scope="module")
def forks():
    from .forks import Forks

    with Forks() as server:
        yield server


@pytest.fixture
def figures(record_property):
    """Numbers of a test that the record of a FULL run keeps."""
    return lambda **values: [record_property(name, value) for name, value in values.items()]


class Record:
    def __init__(self) -> None:
        self.began, self.tests = time.time(), {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.failed:
            self.tests[report.nodeid.removeprefix("tests/battery/")] = {
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                **dict(report.user_properties),
            }

    def pytest_sessionfinish(self, session) -> None:
        if hasattr(session.config, "workerinput") or not self.tests:
            return
        from benchmarks import report

        outcomes = [each["outcome"] for each in self.tests.values()]
        figures = {
            "passed": outcomes.count("passed"),
            "failed": outcomes.count("failed"),
            "seconds": round(time.time() - self.began),
            "tests": dict(sorted(self.tests.items())),
        }
        report.write("battery", figures)


def pytest_configure(config) -> None:
    if FULL and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(), "battery-record")

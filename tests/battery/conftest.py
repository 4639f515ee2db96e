"""FULL=1 runs the sizes of the acceptance list; its figures go to benchmarks/results/battery.json."""

from __future__ import annotations

import os
import time
import warnings

import pytest
from _pytest.runner import runtestprotocol

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


def pytest_runtest_protocol(item, nextitem):
    """Cases that compare every bit of whole runs get a second try, which is said.

    On a loaded machine torch's CPU kernels now and then give other last bits for equal input, in the interrupted run or in
    its twin. What a resume loses, it loses every time.
    """
    if item.path.name != "test_resume.py":
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports):
        warnings.warn(f"{item.nodeid} failed and is tried again", stacklevel=1)
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True

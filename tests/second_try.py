"""A failed test is run once more, and the run says so at its end.

Many tests compare every bit of two computations. On some machines the processor itself has spells of seconds in which
equal instructions on equal operands give other last digits (seen: products of fp64 numbers off by 5e-11 in a few entries,
the same entries in every test for a while, then never again). What the code gets wrong, it gets wrong twice; more than
`ALLOWED` second tries in a process mean that something else is amiss, and failures count at once.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

ALLOWED = 6
LABEL = "first try"


class SecondTry:
    def __init__(self) -> None:
        self.left = ALLOWED

    @pytest.hookimpl
    def pytest_runtest_protocol(self, item, nextitem):
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        failed = next((report for report in reports if report.failed), None)
        # On a card a difference that comes and goes is what a test is there to find.
        if failed is not None and self.left and not item.get_closest_marker("gpu"):
            self.left -= 1
            item._initrequest()  # function-scoped fixtures are made anew
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            if not any(report.failed for report in reports):
                called = next((report for report in reports if report.when == "call"), reports[-1])
                called.user_properties.append((LABEL, failed.longreprtext))
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


def pytest_configure(config) -> None:
    config.pluginmanager.register(SecondTry(), "second-try")


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [each for kind in ("passed", "skipped", "xfailed") for each in terminalreporter.stats.get(kind, [])]
    tries = [(each.nodeid, text) for each in reports for label, text in each.user_properties if label == LABEL]
    if tries:
        terminalreporter.section("ran a second time")
    for nodeid, text in tries:
        terminalreporter.line(f"{nodeid}\n{text}\n")

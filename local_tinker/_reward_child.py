"""Runs in a child process of `rewards.run_python`: limits itself, runs a program and its tests, reports on a pipe.

Read as a script, never imported. The request is JSON on stdin; the report goes to the file descriptor it names.
"""

import io
import json
import os
import resource
import sys
import traceback


def _limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))


def _attempt(source: str, name: str, scope: dict) -> str | None:
    """The error a piece of source ends in, or None."""
    try:
        exec(compile(source, name, "exec"), scope)
    except BaseException as error:  # noqa: B036  SystemExit is a failed test too
        return "".join(traceback.format_exception_only(error)).strip()
    return None


def main() -> None:
    request = json.load(sys.stdin)
    report = os.fdopen(request["report_fd"], "w")
    _limit(resource.RLIMIT_AS, request["memory_bytes"])
    _limit(resource.RLIMIT_CPU, request["cpu_seconds"])
    _limit(resource.RLIMIT_FSIZE, request["output_bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    sys.stdin = io.StringIO(request["stdin"])
    scope = {"__name__": "__main__"}
    error = _attempt(request["code"], "<program>", scope)
    errors = [error or _attempt(test, "<test>", scope) for test in request["tests"]]
    sys.stdout.flush()
    # A program that ends the process early has reported nothing, and one that writes here does not know the key.
    json.dump({"key": request["key"], "error": error, "errors": errors}, report)
    report.flush()
    # Threads and exit handlers of the program have no say in how the run ended.
    os._exit(0 if error is None else 1)


main()

"""What a run shows: lines that fit, on a terminal, in a pipe and where the terminal is dumb."""

import io

import pytest

from local_tinker.hardware import Hardware
from local_tinker.model import catalogue
from local_tinker.recipes import report
from local_tinker.recipes.sft import Config


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(report, "used_bytes", lambda: 3 * 2**30)


def steps(stream, total=3, numbers=None, count=None):
    progress = report.ProgressReport(total, stream=stream)
    for step in range(1, (count or total) + 1):
        progress.step(step, numbers or {"loss": 1.5}, 100)
    progress.note("saved")
    progress.close()
    return stream.getvalue()


def test_plain_lines_where_nobody_watches():
    text = steps(io.StringIO())
    lines = text.splitlines()
    assert [line.split("  ")[:2] for line in lines[:3]] == [[f"step {n}/3", "loss 1.500"] for n in (1, 2, 3)]
    assert lines[2].endswith("0:00 left  3.0 GiB") and lines[3] == "saved" and "\x1b" not in text


def test_plain_lines_on_a_dumb_terminal_and_in_ci(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in steps(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "1")
    assert "\x1b" not in steps(Terminal())


def test_a_live_line_on_a_terminal_without_colour_when_asked(monkeypatch):
    assert "\x1b[3" in steps(Terminal()) and "saved" in steps(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    text = steps(Terminal())
    assert "\x1b[3" not in text and "loss 1.500" in text


@pytest.mark.parametrize("numbers", [{"loss": 0.6931, "accuracy": 0.5}, {"reward_mean": 0.5}, {"loss": 1.2e-7}])
def test_no_plain_line_is_wider_than_sixty_columns(numbers):
    lines = steps(io.StringIO(), total=100_000, numbers=numbers, count=3334).splitlines()
    assert max(map(len, lines)) <= 60 and all(next(iter(numbers)) in line for line in lines[:-1])


def test_a_long_run_prints_about_sixty_lines():
    lines = steps(io.StringIO(), total=1000).splitlines()
    assert 55 <= len(lines) <= 65 and lines[0].startswith("step    1/1000") and lines[-2].startswith("step 1000/1000")


def test_speed_and_time_left_are_those_of_the_last_steps(monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 14.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    progress = report.ProgressReport(10, stream=io.StringIO())
    assert progress.step(1, {}, 100) == 50.0
    assert progress.step(2, {}, 100) == 50.0
    assert progress.step(3, {}, 40) == pytest.approx(240 / 14)


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (61, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")])
def test_durations(seconds, text):
    assert report._time(seconds) == text


def test_the_plan_of_a_run_says_whether_it_fits_and_what_needs_less(capsys):
    dims = catalogue.find("llama-3.1-8b").dims
    card = Hardware(kind="cuda", name="card", total_bytes=24 * 2**30, free_bytes=24 * 2**30, bf16=True)
    config = Config(model="llama-3.1-8b", dataset="d")
    roomy = report.plan_lines(report.plan_for(config, dims, card), card.free_bytes)
    assert (
        "24.00 GiB free: fits" in roomy[0]
        and roomy[1].startswith("  choice: micro-batches of 4,096 tokens")
        and len(roomy) == 3
    )
    small = report.plan_for(config, dims, card, free_bytes=4 * 2**30)
    assert "DOES NOT FIT" in report.plan_lines(small, 4 * 2**30)[0] and small.levers
    report.print_lines(["x " * 100])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_answers_are_one_line_each_and_cut(capsys):
    report.print_answers([("Who?", "I\nam " + "x" * 400, None), ([{"role": "user", "content": "Q"}], "", "A")])
    out = capsys.readouterr().out
    assert (
        "> Who?\n  I am xxx" in out
        and "> Q\n  (nothing)\n  (data: A)" in out
        and max(map(len, out.splitlines())) <= 242
    )

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import typer

from local_tinker.cli import app
from local_tinker.errors import DatasetError, DeviceMemoryError, LocalTinkerError, ModelError, UsageError


@pytest.fixture
def command(monkeypatch):
    """Registers `function` as the only command, `try-it`."""

    def register(function):
        module = type(sys)("local_tinker.cli.try_it")
        module.function = function
        monkeypatch.setitem(sys.modules, "local_tinker.cli.try_it", module)
        monkeypatch.setattr(app, "COMMANDS", {"try-it": ("try_it", "function", "Tries it.")})

    return register


def options(
    batch_size: Annotated[int, typer.Option(help="Rows.")] = 16, max_length: int = 8, quantize: str = "4bit"
) -> None:
    """Takes two numbers and a word."""
    print(batch_size, max_length)


def test_help_lists_every_command_with_its_line(capsys):
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, _, summary) in app.COMMANDS.items():
        assert f"  {name}" in text and summary in text
    assert app.main([]) == 0 and capsys.readouterr().out == text


def test_help_fits_eighty_columns_or_says_less():
    assert max(map(len, app.help_text().splitlines())) <= 90


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_every_registered_command_answers_its_own_help(name, capsys):
    assert app.main([name, "--help"]) == 0
    by_flag = capsys.readouterr().out
    assert "Usage" in by_flag or "usage" in by_flag
    assert app.main(["help", name]) == 0 and capsys.readouterr().out == by_flag


@pytest.mark.parametrize(
    "words", [["try-it", "--batch-size", "3"], ["try_it", "--batch_size", "3"], ["try-it", "--batch-size=3"]]
)
def test_kebab_case_and_underscores_mean_the_same(command, capsys, words):
    command(options)
    assert app.main(words) == 0
    assert capsys.readouterr().out == "3 8\n"


@pytest.mark.parametrize(
    "words, says",
    [
        (["try-ti"], "no command 'try-ti'; did you mean try-it?"),
        (["zzz"], "no command 'zzz'; see `local-tinker --help`"),
        (["--verison"], "no option '--verison'; did you mean --version?"),
        (["try-it", "--batch-sise", "3"], "no option --batch-sise; did you mean --batch-size?"),
        (["try-it", "--load-in-4bit"], "no option --load-in-4bit; did you mean --quantize 4bit?"),
        (["try-it", "--zzz"], "no option --zzz; see `local-tinker try-it --help`"),
        (["trian"], "no command 'trian'; did you mean run?"),
        (["grpo"], "no command 'grpo'; did you mean run --loss grpo?"),
        (["try-it", "--batch-size", "x"], "--batch-size: got 'x', a whole number is needed; see"),
        (["try-it", "--batch_size=2", "--batch_size=1.5"], "--batch-size: got '1.5', a whole number is needed; see"),
        (["try-it", "--batch-size"], "--batch-size"),
        (["try-it", "extra"], "unexpected extra argument"),
    ],
)
def test_mistakes_end_with_code_2_one_line_and_no_traceback(command, capsys, words, says):
    command(options)
    assert app.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, code",
    [
        (UsageError("rank must be >= 1"), 2),
        (DatasetError("no text", path="a.jsonl", line=3), 2),
        (ModelError("no such model"), 3),
        (DeviceMemoryError("nothing smaller is left"), 4),
        (LocalTinkerError("the run failed"), 1),
    ],
)
def test_our_errors_end_with_their_code_and_message(command, capsys, error, code):
    def fail() -> None:
        raise error

    command(fail)
    assert app.main(["try-it"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_ends_with_130(command, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    command(interrupted)
    assert app.main(["try-it"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_output_that_cannot_be_written_is_one_message(command, capsys, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command(full)
    monkeypatch.setattr("sys.stdout", sys.stdout)  # put back: main gives it up
    assert app.main(["try-it"]) == 1
    assert sys.stdout is None
    assert capsys.readouterr().err == "error: the output cannot be written: No space left on device\n"


def test_an_os_error_that_is_no_full_disk_is_not_hidden(command):
    def broken() -> None:
        raise ChildProcessError(errno.ECHILD, "a bug")

    command(broken)
    with pytest.raises(ChildProcessError):
        app.main(["try-it"])


def test_a_command_chooses_its_exit_code(command):
    def broken() -> int:
        return 3

    command(broken)
    assert app.main(["try-it"]) == 3


def test_a_command_of_argv_gets_the_words_as_they_came(command):
    seen = []

    def raw(argv):
        seen.extend(argv)

    command(raw)
    assert app.main(["try-it", "--any_thing", "-x", "--help"]) == 0
    assert seen == ["--any_thing", "-x", "--help"]


def test_a_mistake_of_ours_is_not_hidden(command):
    def bug() -> None:
        raise ZeroDivisionError

    command(bug)
    with pytest.raises(ZeroDivisionError):
        app.main(["try-it"])


def test_version_is_the_installed_one(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"local-tinker": "9.8.7"}[name])
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == "local-tinker 9.8.7\n"


def run(words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "local_tinker", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_module_runs_as_a_program_and_passes_the_code_on():
    assert run(["--help"]).stdout.startswith("Usage: local-tinker")
    done = run(["modles"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no command 'modles'; did you mean models?\n"


@pytest.mark.parametrize(
    "extra, colour", [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False), ({}, False)]
)
def test_colour_codes_follow_the_environment(extra, colour):
    assert ("\x1b[" in run(["modles"], **extra).stderr) == colour


def test_a_reader_that_leaves_early_causes_no_noise():
    command = f"{sys.executable} -m local_tinker models --vram 24 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "For a card with 24.0 GiB free:\n" and done.stderr == ""


def test_an_interrupt_while_the_command_line_is_imported_ends_with_130():
    code = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'local_tinker.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from local_tinker.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_installed_program_begins_where_an_interrupt_is_answered():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"local-tinker": "local_tinker.__main__:main"}

"""What the second try lets pass, and what it does not."""

import subprocess
import sys
from pathlib import Path

from tests.second_try import ALLOWED

ROOT = Path(__file__).parent.parent


def run(folder: Path, text: str) -> str:
    (folder / "test_some.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.second_try", "-p", "no:cacheprovider", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout


def test_what_fails_twice_has_failed(tmp_path):
    text = run(tmp_path, "def test_wrong():\n    assert 1 == 2\n")
    assert "1 failed" in text and "ran a second time" not in text


def test_what_fails_once_is_shown_and_its_fixture_is_made_anew(tmp_path):
    text = run(
        tmp_path,
        "import pytest\ntries = []\n\n@pytest.fixture\ndef number():\n    tries.append(0)\n    return len(tries)\n\n"
        "def test_flip(number):\n    assert number == 2, 'the last digit'\n\ndef test_right():\n    pass\n",
    )
    assert "2 passed" in text and "1 failed" not in text
    shown = text[text.index("ran a second time") :]
    assert "test_some.py::test_flip" in shown and "the last digit" in shown and "test_right" not in shown


def test_more_than_a_few_count_at_once(tmp_path):
    text = run(
        tmp_path,
        "import pytest\nseen = set()\n\n@pytest.mark.parametrize('n', range(10))\ndef test_flip(n):\n"
        "    first = n not in seen\n    seen.add(n)\n    assert not first\n",
    )
    assert f"{10 - ALLOWED} failed, {ALLOWED} passed" in text


def test_on_a_card_the_first_try_counts(tmp_path):
    text = run(
        tmp_path,
        "import pytest\nseen = []\n\n@pytest.mark.gpu\ndef test_flip():\n    seen.append(0)\n    assert len(seen) == 2\n",
    )
    assert "1 failed" in text and "ran a second time" not in text

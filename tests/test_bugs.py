"""Every seeded bug can still be planted and names tests that exist. That the tests catch it, the battery shows."""

import re

import pytest

from tests.bugs import ROOT, bugs


def test_there_are_forty_and_no_two_are_alike():
    found = bugs()
    assert len(found) >= 40 and len({bug.name for bug in found}) == len({(b.file, b.find, b.replace) for b in found})
    assert len({bug.name for bug in found}) == len(found)


@pytest.mark.parametrize("bug", bugs(), ids=lambda bug: bug.id)
def test_a_bug_applies_to_one_place_and_its_tests_exist(bug):
    assert (ROOT / "local_tinker" / bug.file).read_text().count(bug.find) == 1
    compile((ROOT / "local_tinker" / bug.file).read_text().replace(bug.find, bug.replace), bug.file, "exec")
    assert bug.tests
    for name in bug.tests:
        path, *parts = name.split("[")[0].split("::")
        text = (ROOT / path).read_text()
        assert all(re.search(rf"(def|class) {part}\b", text) for part in parts), name

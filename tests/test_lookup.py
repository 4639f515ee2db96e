"""Which run a word means."""

import pytest

from local_tinker import lookup
from local_tinker.errors import UsageError
from local_tinker.runs import Run


@pytest.fixture
def history(tmp_path):
    made = [Run.create(tmp_path, name, config={}) for name in ("alpha", "beta", "beta")]
    for run in made:
        run.finish("finished")
    return tmp_path, made


def test_a_run_is_found_by_folder_id_start_name_and_age(history):
    root, (alpha, _, newest) = history
    for word in (str(alpha.path), alpha.id, alpha.id[:-2], "alpha"):
        assert lookup.find_run(word, root).id == alpha.id, word
    assert lookup.find_run("last", root).id == newest.id
    # the start of an id with the folder before it, whatever the root is
    assert lookup.find_run(str(alpha.path)[:-2], "elsewhere").id == alpha.id


def test_what_means_several_runs_or_none_says_which_there_are(history):
    root, (alpha, older, newer) = history
    with pytest.raises(UsageError, match=f"'beta' means 2 runs, {older.id}, {newer.id}; give one of these, or last"):
        lookup.find_run("beta", root)
    with pytest.raises(UsageError, match=f"no run 'alhpa' in {root}; did you mean the run {alpha.id}?"):
        lookup.find_run("alhpa", root)
    with pytest.raises(UsageError, match="no run 'zzzz' .*`local-tinker runs list --root .*` shows the runs"):
        lookup.find_run("zzzz", root)
    with pytest.raises(UsageError, match="which holds no runs"):
        lookup.find_run("last", root / "absent")


def test_many_matches_are_shown_in_part(tmp_path):
    for _ in range(6):
        Run.create(tmp_path, "same", config={}).finish("finished")
    with pytest.raises(UsageError, match="means 6 runs, the newest 4: ") as caught:
        lookup.find_run("same", tmp_path)
    assert str(caught.value).count("-same-") == 4

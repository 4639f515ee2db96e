import gzip
import json
import os
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_tinker.data import read
from local_tinker.data.read import load_rows, strip_holes
from local_tinker.data.rows import Row, Rows, RowSource
from local_tinker.errors import DatasetError, MissingDependencyError, UsageError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows):
    return [row["text"] for row in rows]


def test_a_row_remembers_its_file_and_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    rows = load_rows(path)
    assert rows[1] == {"text": "b"} and isinstance(rows[1], dict)
    assert str(rows[1].source) == "train.jsonl line 3"
    assert rows[1].source == RowSource(str(path), 3)


def test_elements_of_an_array_have_the_line_they_start_on(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text":\n "a"}, {"text": "b"},\n\n {"text": "c"}]')
    assert [row.source.line for row in load_rows(path)] == [1, 2, 4]


def test_a_glob_reads_its_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "2"})
    write(tmp_path / "a.jsonl", {"text": "1"})
    assert texts(load_rows(str(tmp_path / "*.jsonl"))) == ["1", "2"]
    with pytest.raises(DatasetError, match="no file matches"):
        load_rows(str(tmp_path / "*.csv"))


def test_a_folder_of_splits_is_never_read_whole(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "1"}, {"text": "2"})
    write(tmp_path / "test.jsonl", {"text": "3"})
    said = []
    assert texts(load_rows(tmp_path, say=said.append)) == ["1", "2"]
    assert "not read: test.jsonl" in said[0]
    assert texts(load_rows(tmp_path, split="test")) == ["3"]
    assert texts(load_rows(f"{tmp_path}#train[1:]")) == ["2"]
    with pytest.raises(DatasetError, match="no split 'dev'; here: test, train"):
        load_rows(tmp_path, split="dev")


def test_limit_counts_rows_and_minus_one_means_all(tmp_path):
    path = write(tmp_path / "x.jsonl", *({"text": str(i)} for i in range(5)))
    assert texts(load_rows(path, limit=2)) == ["0", "1"]
    assert len(load_rows(path, limit=-1)) == 5
    assert texts(load_rows(path, split="[1:4]", limit=2)) == ["1", "2"]
    for wrong in (-2, True, 1.5):
        with pytest.raises(UsageError):
            load_rows(path, limit=wrong)


def test_a_file_that_is_not_there_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DatasetError, match=r"no such file.*train\.jsonl"):
        load_rows(tmp_path / "trian.jsonl")


def test_pipes_devices_and_link_loops_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(DatasetError, match="not a regular file"):
            load_rows(tmp_path / f"{name}.jsonl")
    with pytest.raises(DatasetError, match="cannot be opened"):
        load_rows(tmp_path / "loop.jsonl")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", {"text": "a"})
    fstat = os.fstat

    def growing(handle):
        found = fstat(handle)
        with open(path, "a") as file:
            file.write('{"text": "b"}\n')
        return found

    monkeypatch.setattr(read.os, "fstat", growing)
    with pytest.raises(DatasetError, match="changed while"):
        load_rows(path)


def test_one_example_of_ten_megabytes_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x" * 10_000_000}) + "\n")
    assert len(load_rows(path)[0]["text"]) == 10_000_000


def test_a_json_file_of_lines_is_read_and_an_object_of_columns_is_not(tmp_path):
    lines, said = tmp_path / "lines.json", []
    write(lines, {"text": "a"}, {"text": "b"})
    assert len(load_rows(lines, say=said.append)) == 2 and "JSON lines" in said[0]
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"text": "a"}], "version": 1}, indent=1))
    with pytest.raises(DatasetError, match="one JSON object with the keys data, version"):
        load_rows(tmp_path / "one.json")


def test_gzip_is_recognised_by_its_bytes_also_for_csv(tmp_path):
    (tmp_path / "x.csv").write_bytes(gzip.compress(b"text\nhello\n"))
    assert list(load_rows(tmp_path / "x.csv")) == [{"text": "hello"}]


def test_csv_fields_may_be_long_and_the_process_wide_limit_is_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f"text\n{'y' * 300_000}\n")
    assert len(load_rows(tmp_path / "x.csv")[0]["text"]) == 300_000
    assert csv.field_size_limit() == before


def test_csv_headers_must_be_named_once(tmp_path):
    (tmp_path / "x.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DatasetError, match="two columns of the same name"):
        load_rows(tmp_path / "x.csv")


def test_missing_optional_packages_name_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1xxxx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        load_rows(tmp_path / "x.parquet")
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        load_rows("some-org/some-data")


def hub(monkeypatch, answer):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return answer() if callable(answer) else answer

    config = types.SimpleNamespace(HF_DATASETS_CACHE="no/cache")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=config))
    return calls


@pytest.mark.parametrize(
    ("source", "split", "arguments", "asked"),
    [
        ("org/name", None, ("org/name", None), "train"),
        ("hub:org/name#train[:1000]", None, ("org/name", None), "train[:1000]"),
        ("org/name#test[:10%]", None, ("org/name", None), "test[:10%]"),
        ("org/name:main", "test", ("org/name", "main"), "test"),
    ],
)
def test_hub_ids_split_and_configuration(monkeypatch, source, split, arguments, asked):
    calls = hub(monkeypatch, [{"text": "a", "extra": None}, {"text": "b", "extra": None}])
    rows = load_rows(source, split=split, limit=1)
    assert calls == [(arguments, {"split": asked})]
    assert list(rows) == [{"text": "a"}]
    assert str(rows[0].source) == f"name#{asked} line 1"


def test_a_hub_failure_is_a_dataset_error_with_its_reason(monkeypatch):
    def offline():
        raise ConnectionError("offline mode is on\nmore")

    hub(monkeypatch, offline)
    with pytest.raises(DatasetError, match="could not be loaded: offline mode is on$"):
        load_rows("org/name")


def test_a_hub_out_of_reach_is_asked_once_and_a_file_of_a_like_name_is_shown(monkeypatch, tmp_path):
    calls, asked = hub(monkeypatch, [{"text": "a"}]), []

    def dataset_info(self, hub_id, **options):
        asked.append(hub_id)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DatasetError, match=r"did you mean rows.jsonl\?\), and the hub id .* loaded: nobody answers$"):
        load_rows("rows.jsnl")
    assert asked == ["rows.jsnl"] and calls == []
    # what is in the cache is left to datasets
    (tmp_path / "no" / "cache" / "org___name").mkdir(parents=True)
    assert list(load_rows("org/name")) == [{"text": "a"}] and asked == ["rows.jsnl"]


def test_a_file_that_is_not_there_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DatasetError, match=r"row.jsonl: no such file. Did you mean rows.jsonl\?"):
        load_rows("row.jsonl")
    with pytest.raises(DatasetError, match="no such file. This folder holds: rows.jsonl"):
        load_rows("elsewhere.csv")


def test_none_holes_go_at_every_depth_but_list_values_stay():
    row = {"a": None, "m": [{"role": "user", "calls": None}, None], "n": [1, None]}
    assert strip_holes(row) == {"m": [{"role": "user"}], "n": [1, None]}


def test_the_digest_is_of_content_alone(tmp_path):
    one = load_rows(write(tmp_path / "a.jsonl", {"text": "a", "n": 1}, {"text": "b"}))
    other = load_rows(write(tmp_path / "b.jsonl", {"n": 1, "text": "a"}, {"text": "b"}))
    assert one.digest == other.digest
    assert Rows([Row({"text": "b"}), Row({"text": "a", "n": 1})]).digest != one.digest
    assert one[:1].digest != one.digest and isinstance(one[:1], Rows)


SEEDS = [
    b'{"text": "a"}\n{"messages": [{"role": "user", "content": "\\u00e9\\ud83d\\ude00"}]}\n',
    b'[{"text": "a"},\n {"text": "b", "n": [1, 2.5e3, null, true]}]\n',
    '﻿prompt,completion\r\n"a\n",b\r\n'.encode(),
    gzip.compress(b'{"text": "a"}\n', mtime=0),
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.sampled_from(SEEDS),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz"]),
    edits=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(["set", "cut", "insert"]), st.integers(0, 255)), max_size=6
    ),
)
def test_mutated_bytes_give_rows_or_a_dataset_error(tmp_path, seed, suffix, edits):
    data = bytearray(seed)
    for place, what, byte in edits:
        place %= len(data) + 1
        if what == "set" and place < len(data):
            data[place] = byte
        elif what == "insert":
            data.insert(place, byte)
        elif what == "cut":
            del data[place:]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(bytes(data))
    try:
        rows = load_rows(path, max_bad=byte % 3 if edits else 0)
    except DatasetError as error:
        assert str(path) in str(error)
    else:
        assert rows and all(isinstance(row, dict) for row in rows)
        json.dumps(list(rows)).encode()

"""Saved folders: the order of system calls, kills and errors at each of them, corruption, names, rotation, locks."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import pickle
import random
import subprocess
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_tinker.checkpoint import (
    MANIFEST,
    Disk,
    FolderLock,
    ProcessMark,
    check_name,
    dump_json,
    inside,
    latest_valid,
    list_checkpoints,
    load_tensors,
    parse_json,
    read_folder,
    replace_file,
    rotate,
    sweep,
    write_folder,
)
from local_tinker.errors import CheckpointError, CorruptCheckpointError, StateError, UsageError

_spec = importlib.util.spec_from_file_location("checkpoint_tools", Path(__file__).with_name("checkpoint_tools.py"))
tools = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tools)
FILES, KillServer, Watched = tools.FILES, tools.KillServer, tools.Watched
change, hidden, run_code, save, start = tools.change, tools.hidden, tools.run_code, tools.save, tools.start


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where possible: thousands of syncs of a real disk test the disk; the long tests do that."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


# what is written and what comes back


def test_a_saved_folder_reads_back_and_its_manifest_holds_independent_sizes_and_hashes(tmp_path):
    path = save(tmp_path, 7)
    document = json.loads((path / MANIFEST).read_text())
    for name, content in {**FILES, "state.json": b'{"step": 7}'}.items():
        assert document["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert document["version"] == 1
    checkpoint = read_folder(path)
    assert checkpoint.meta == {"step": 7, "owner": "run-a", "base_model": "f" * 16}
    assert checkpoint.bytes("adapter.safetensors") == FILES["adapter.safetensors"]
    assert checkpoint.file("state.json") == path / "state.json"
    assert load_tensors(checkpoint, "optimizer.safetensors") == FILES["optimizer.safetensors"]
    assert hidden(tmp_path) == []


def test_files_may_be_written_by_functions_and_may_be_empty(tmp_path):
    path = write_folder(
        tmp_path / "a", {"f.bin": lambda p: p.write_bytes(b"xyz") and None, "empty": b""}, meta={}, reserve=3
    )
    checkpoint = read_folder(path)
    assert (checkpoint.bytes("f.bin"), checkpoint.bytes("empty")) == (b"xyz", b"")
    assert checkpoint.manifest["f.bin"].sha256 == hashlib.sha256(b"xyz").hexdigest()


def test_a_file_written_by_a_function_is_synced_too(tmp_path):
    disk = Watched()
    write_folder(tmp_path / "a", {"f.bin": lambda p: p.write_bytes(b"xyz") and None}, meta={}, disk=disk)
    steps = [name for name, *_ in disk.calls]
    assert steps[steps.index("open") :][:3] == ["open", "fsync", "close"]
    assert disk.calls[steps.index("open")][2] == disk.calls[steps.index("open") + 1][1], "the file just written"


def test_a_function_that_leaves_another_file_is_an_error(tmp_path):
    def two(path):
        path.write_bytes(b"x")
        path.with_name("stray").write_bytes(b"y")

    with pytest.raises(CheckpointError, match="stray"):
        write_folder(tmp_path / "a", {"f": two}, meta={})
    assert os.listdir(tmp_path) == []


def test_missing_parent_folders_are_made_and_synced_into_their_parents(tmp_path):
    disk = Watched()
    write_folder(tmp_path / "runs" / "one" / "step-1", {"f": b"1"}, meta={}, disk=disk)
    made = [call[1] for call in disk.calls if call[0] == "mkdir"][:2]
    assert made == [tmp_path / "runs", tmp_path / "runs" / "one"]
    assert [call[1] for call in disk.calls if call[0] == "fsync_dir"][:2] == [tmp_path, tmp_path / "runs"]


def test_a_large_write_survives_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    data = random.Random(0).randbytes(25_111)
    path = write_folder(tmp_path / "a", {"f": data}, meta={})
    monkeypatch.undo()
    assert read_folder(path).bytes("f") == data


def test_an_existing_folder_is_refused_unless_overwrite(tmp_path):
    save(tmp_path, 1, name="best")
    with pytest.raises(CheckpointError, match="exists"):
        save(tmp_path, 2, name="best")
    assert read_folder(tmp_path / "best").meta["step"] == 1
    save(tmp_path, 2, name="best", overwrite=True)
    assert read_folder(tmp_path / "best").meta["step"] == 2
    assert hidden(tmp_path) == []


def test_overwrite_never_deletes_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(CheckpointError, match="not a folder saved by"):
            save(tmp_path, 1, name=name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


# the order of system calls


def test_every_file_is_synced_before_the_manifest_then_the_folder_then_rename_then_the_parent(tmp_path):
    disk = Watched()
    target = save(tmp_path, 1, disk=disk)
    fd_name, events = {}, []
    for name, *args in disk.calls:
        if name == "create":
            fd_name[args[1]] = args[0].name
        if name in ("fsync", "write"):
            events.append(f"{name} {fd_name[args[0]]}")
        if name == "fsync_dir":
            events.append("sync parent" if args[0] == tmp_path else "sync staged")
            assert args[0] == tmp_path or args[0].name.startswith(".tmp-step-1-")
        if name == "rename":
            assert args[0].parent == tmp_path and args[1] == target
            events.append("rename")
    names = list(FILES)
    assert events == [f"{verb} {name}" for name in [*names, MANIFEST] for verb in ("write", "fsync")] + [
        "sync staged",
        "rename",
        "sync parent",
    ]


def test_overwrite_removes_the_old_folder_only_after_the_new_one_is_durable(tmp_path):
    save(tmp_path, 1, name="best")
    disk = Watched()
    save(tmp_path, 2, name="best", overwrite=True, disk=disk)
    short = [
        (name, *(part.name.split("-")[0] if isinstance(part, Path) else "fd" for part in args))
        for name, *args in disk.calls
        if name in ("rename", "unlink", "rmdir", "fsync_dir")
    ]
    publish = short.index(("rename", "best", ".old"))
    assert short[publish : publish + 4] == [
        ("rename", "best", ".old"),
        ("rename", ".tmp", "best"),
        ("fsync_dir", tmp_path.name.split("-")[0]),
        ("rename", ".old", ".del"),
    ]
    assert {call[0] for call in short[publish + 4 :]} == {"unlink", "rmdir"}


# kills


@pytest.mark.parametrize("mode", ["save", "overwrite", "rotate"])
def test_a_kill_after_any_system_call_leaves_only_whole_checkpoints_and_sweepable_leftovers(tmp_path, mode):
    disk = Watched()
    save(tmp_path / "count", 1), save(tmp_path / "count", 2)
    change(mode, tmp_path / "count", disk)
    assert len(disk.calls) > 5
    with KillServer() as server:
        for at in range(1, len(disk.calls) + 1):
            root = tmp_path / str(at)
            save(root, 1), save(root, 2)
            server.kill(mode, root, at)
            listed = {checkpoint.name: checkpoint for checkpoint in list_checkpoints(root, verify="hash")}
            assert {name for name in os.listdir(root) if not name.startswith(".")} == set(listed)
            assert listed["step-2"].meta["step"] in ((2, 9) if mode == "overwrite" else (2,))
            assert mode == "rotate" or "step-1" in listed
            newest = latest_valid(root)
            sweep(root)
            assert hidden(root) == []
            assert latest_valid(root).meta == newest.meta
            save(root, 4)
            assert latest_valid(root).meta["step"] in (4, 9)


def test_no_change_of_the_disk_bypasses_the_calls_that_are_killed_and_failed(tmp_path):
    """Python's own audit of file system changes against what a recorder in Disk's place has seen."""
    done = run_code(
        """
        from local_tinker.checkpoint.disk import Disk as Real
        changes, calls = [], []

        def audit(event, args):
            if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                changes.append("create")
            elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
                changes.append(event)

        names = {"create": "create", "mkdir": "os.mkdir", "rename": "os.rename", "replace": "os.rename"}
        for name, event in {**names, "unlink": "os.remove", "rmdir": "os.rmdir"}.items():
            def call(self, *args, real=getattr(Real, name), event=event):
                calls.append(event)
                return real(self, *args)
            setattr(Real, name, call)
        root = args[0]
        sys.addaudithook(audit)
        for step in (1, 2, 3):
            write_folder(f"{root}/deep/step-{step}", {"a": b"1", "b": b"2"}, meta={"step": step})
        write_folder(f"{root}/deep/step-3", {"a": b"1"}, meta={"step": 3}, overwrite=True)
        replace_file(f"{root}/run.json", b"{}")
        rotate(f"{root}/deep", 1, owner=None)
        sweep(f"{root}/deep")
        print(len(changes), changes == calls)
        """,
        tmp_path,
    )
    assert done.out == b"38 True\n", (done.out, done.err)


def test_random_kills_lose_nothing_acknowledged(tmp_path):
    tools.run_parallel([lambda i=i: tools.random_kills(tmp_path / str(i), 15, i) for i in range(2)])


# errors


@pytest.mark.parametrize("number", tools.ERRNOS, ids=lambda number: errno.errorcode[number])
def test_an_error_at_any_system_call_of_a_save_is_typed_and_a_retry_succeeds(tmp_path, number):
    tools.fail_everywhere(tmp_path, number, overwrite=False, forever=False)


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
def test_an_error_at_any_system_call_of_an_overwrite_keeps_the_old_folder(tmp_path, forever):
    tools.fail_everywhere(tmp_path, errno.EIO, overwrite=True, forever=forever)


def test_an_error_with_staged_files_removes_them(tmp_path):
    def before(n, name, args):
        if name == "fsync":
            raise OSError(errno.EIO, "x")

    with pytest.raises(CheckpointError):
        save(tmp_path, 1, disk=Watched(before=before))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_during_a_save_removes_what_was_staged_and_passes_on(tmp_path):
    save(tmp_path, 1)
    for at in range(1, 19):

        def before(n, name, args, at=at):
            if n == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, disk=Watched(before=before))
        assert os.listdir(tmp_path) == ["step-1"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    class Full(Disk):
        def free(self, path):
            return 10

        def mkdir(self, path):
            raise AssertionError("wrote")

    with pytest.raises(CheckpointError, match=r"needs 2,011 bytes, 10 are free") as caught:
        write_folder(tmp_path / "a", {"f": b"x" * 11, "g": lambda p: None}, meta={}, reserve=2000, disk=Full())
    assert "No space left" in str(caught.value) and "free space" in str(caught.value)


def test_unknown_sizes_are_said_to_be_a_lower_bound(tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, "x")

    with pytest.raises(CheckpointError, match="at least 11 bytes"):
        write_folder(tmp_path / "a", {"f": b"x" * 11, "g": full}, meta={})


def test_a_full_disk_reported_by_a_rust_library_is_typed_too(tmp_path):
    def full(path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match="ENOSPC"):
        write_folder(tmp_path / "a", {"g": full}, meta={})
    with pytest.raises(RuntimeError, match="other"):
        write_folder(tmp_path / "a", {"g": lambda p: (_ for _ in ()).throw(RuntimeError("other"))}, meta={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("announce", [True, False], ids=["known-size", "unknown-size"])
def test_a_real_full_disk_leaves_the_old_checkpoint_and_no_leftovers(tmp_path, announce):
    with tools.small_disks(tmp_path) as mount:
        sizes = [size << 10 for size in (40, 104, 112, 200)]
        fitted = [tools.fill_small_disk(mount(128), size, announce=announce) for size in sizes]
    assert fitted[0] and not fitted[-1]
    assert fitted == sorted(fitted, reverse=True)


# corruption


def test_any_flipped_bit_is_refused_with_the_file_named(tmp_path):
    tools.flip_bits(tmp_path, 40, seed=1)


def test_truncated_zero_filled_and_lengthened_files_are_refused_with_the_file_named(tmp_path):
    tools.damage_lengths(tmp_path, 12, seed=2)


def test_a_deleted_extra_or_swapped_file_is_refused_with_the_file_named(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    for name in FILES:
        content = (one / name).read_bytes()
        (one / name).unlink()
        with pytest.raises(CorruptCheckpointError, match=f"{name} is missing"):
            read_folder(one, verify="size")
        (one / name).write_bytes(content)
    (one / "notes.txt").write_text("hello")
    with pytest.raises(CorruptCheckpointError, match="notes.txt is not in its manifest"):
        read_folder(one)
    (one / "notes.txt").unlink()
    (one / "state.json").write_bytes((two / "state.json").read_bytes())  # same size, another step
    with pytest.raises(CorruptCheckpointError, match="state.json does not have the sha256"):
        read_folder(one)
    (one / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="holds no MANIFEST.json"):
        read_folder(one)


def test_bytes_are_verified_again_when_they_are_read(tmp_path):
    path = save(tmp_path, 1)
    checkpoint = read_folder(path, verify="size")
    (path / "adapter.safetensors").write_bytes(b"b" * 700)
    with pytest.raises(CorruptCheckpointError, match="adapter.safetensors does not have"):
        load_tensors(checkpoint, "adapter.safetensors")


def test_links_and_pipes_in_a_checkpoint_are_refused_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["adapter.safetensors"])
    for plant in (lambda p: p.symlink_to(secret), os.mkfifo, os.mkdir):
        path = save(tmp_path, 1, overwrite=True)
        (path / "adapter.safetensors").unlink()
        plant(path / "adapter.safetensors")
        with pytest.raises(CorruptCheckpointError, match="adapter.safetensors is (a link|not a regular file)"):
            read_folder(path, verify="size")


def rewrite_manifest(path: Path, **changes: object) -> None:
    """A manifest that is right about itself but says something else, as an attacker would write it."""
    document = {**json.loads((path / MANIFEST).read_bytes()), **changes}
    del document["sha256"]
    document["sha256"] = hashlib.sha256(dump_json(document)).hexdigest()
    (path / MANIFEST).write_bytes(dump_json(document))


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"s")
    path = save(tmp_path, 1)
    for name in ("../secret", "/etc/passwd", "a/b", "..", ""):
        rewrite_manifest(path, files={name: {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}})
        with pytest.raises(CorruptCheckpointError, match=MANIFEST):
            read_folder(path)


def test_unknown_format_versions_are_refused_with_what_to_do(tmp_path):
    path = save(tmp_path, 1)
    for version in (0, 2, "1", None):
        rewrite_manifest(path, version=version)
        with pytest.raises(CheckpointError, match=r"format version .* reads 1: upgrade it"):
            read_folder(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"format": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"\xff\xfe{}",
        b'{"format": "local-tinker-folder", "version": 1}',
        b'{"format": "local-tinker-folder", "version": 1, "files": {"a": {"size": "x", "sha256": 1}}}',
        b'{"format": "local-tinker-folder", "version": 1, "files": [], "meta": 1, "created": 2}',
    ],
    ids=range(10),
)
def test_a_malformed_manifest_is_a_corrupt_checkpoint(tmp_path, text):
    path = save(tmp_path, 1)
    (path / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptCheckpointError, match=MANIFEST):
        read_folder(path)
    assert list_checkpoints(tmp_path) == []


def test_meta_is_strict_json(tmp_path):
    for bad, where in (
        ({"lr": float("nan")}, "meta.lr is nan"),
        ({"a": [1, float("inf")]}, r"meta.a\[1\] is inf"),
        ({"a": {3: 1}}, "meta.a has the key 3"),
        ({"a": {1, 2}}, "meta.a is a set"),
        ({"a": Path("x")}, "meta.a is a PosixPath"),
    ):
        with pytest.raises(CheckpointError, match=where):
            write_folder(tmp_path / "a", {"f": b""}, meta=bad)
    assert os.listdir(tmp_path) == []
    meta = {"betas": (0.9, 0.95), "seed": 2**80, "name": "é\ud800", "none": None, "tiny": 5e-324}
    path = write_folder(tmp_path / "a", {"f": b""}, meta=meta)
    assert read_folder(path).meta == {**meta, "betas": [0.9, 0.95]}


def test_strict_json_refuses_what_has_two_readings():
    for text in (b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1, "a": 1}', b"[" * 100_000):
        with pytest.raises(ValueError):
            parse_json(text)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/local-tinker-was-here",))


def test_pickles_in_a_checkpoint_folder_are_never_opened(tmp_path):
    names = ["optimizer.pt", "pytorch_model.bin", "adapter_model.bin", "rng_state.pth", "training_args.bin"]
    extra, listed = save(tmp_path, 1), tmp_path / "step-2"
    payload = pickle.dumps(Evil())
    for name in names:
        (extra / name).write_bytes(payload)
    write_folder(listed, {**FILES, **dict.fromkeys(names, payload)}, meta={"step": 2})
    code = """
        opened = []
        sys.addaudithook(lambda event, a: opened.append((event, str(a[0]))) if event in ("open", "pickle.find_class")
                         else None)
        try:
            read_folder(args[0])
            raise SystemExit("read a folder with extra files")
        except CorruptCheckpointError as error:
            print(error)
        assert not [o for o in opened if o[1].endswith((".pt", ".bin", ".pth"))], opened
        checkpoint = read_folder(args[1])  # these are in the manifest: hashed as bytes, never interpreted
        for name in checkpoint.manifest:
            checkpoint.bytes(name)
        try:
            load_tensors(checkpoint, "optimizer.pt")
        except Exception as error:
            print(type(error).__name__, error)
        assert [o for o in opened if o[1].endswith("state.json")], "the hook sees opens"
        assert not [o for o in opened if o[0] == "pickle.find_class"]
        assert not {"pickle", "_pickle", "torch", "numpy", "safetensors"} & set(sys.modules)
    """
    process = run_code(
        "from local_tinker.errors import CorruptCheckpointError\n" + textwrap.dedent(code), extra, listed
    )
    assert process.returncode == 0, process.err.decode()
    assert b"adapter_model.bin is not in its manifest" in process.out
    assert b"UsageError got 'optimizer.pt'" in process.out
    assert not Path("/tmp/local-tinker-was-here").exists()


def test_importing_checkpoint_is_quick_and_needs_no_torch_or_numpy():
    process = run_code("assert not {'torch', 'numpy', 'transformers', 'filelock', 'pickle'} & set(sys.modules)")
    assert process.returncode == 0, process.err.decode()


# names


GOOD_NAMES = ["a", "Step-1", "0", "a.b_c-d", "a" * 128, "console", "x..y", "comma"]
BAD_NAMES = [
    "", ".", "..", "../x", "../../x", "/etc/x", "a/b", "a\\b", "%2e%2e%2f", "a\n", "\na", "a\0b", "a" * 129, "é" * 128,
    "CON", "con.txt", "NUL", "Com1", "lpt9.log", "x.", " x", "x ", "-rf", ".hidden", "_x", "é", "e\u0301", "ﬁ", "a:b",
    "~", "a*", None, 7, b"a",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_plain_names_are_allowed(tmp_path, name):
    assert check_name(name) == name
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_that_could_mean_another_path_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="a name is 1 to 128"):
        inside(tmp_path, name)
    if isinstance(name, str):
        with pytest.raises(UsageError):
            write_folder(tmp_path / "a", {name: b""}, meta={})


def test_a_link_planted_in_the_root_is_refused_and_not_listed(tmp_path):
    outside, root = save(tmp_path / "outside", 1), tmp_path / "root"
    root.mkdir()
    (root / "step-9").symlink_to(outside)
    with pytest.raises(UsageError, match="leads out of"):
        inside(root, "step-9")
    assert list_checkpoints(root) == [] and latest_valid(root) is None
    rotate(root, 1, owner="run-a"), sweep(root)
    assert read_folder(outside).meta["step"] == 1


@pytest.mark.parametrize("target", ["", ".", "..", "a/..", ".hidden", "a\0b"])
def test_targets_that_are_no_visible_name_are_refused(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot save as"):
        write_folder(target, {"f": b""}, meta={}, overwrite=True)
    assert os.listdir(tmp_path) == []


def test_file_names_that_collide_are_refused(tmp_path):
    for files in ({}, {"manifest.JSON": b""}, {"A": b"", "a": b""}):
        with pytest.raises(UsageError):
            write_folder(tmp_path / "a", files, meta={})


def test_a_name_too_long_for_the_file_system_is_a_typed_error(tmp_path):
    with pytest.raises(CheckpointError, match="choose a shorter name"):
        write_folder(tmp_path / ("n" * 240), {"f": b""}, meta={})
    assert os.listdir(tmp_path) == []


# listing, rotation, sweeping


def test_a_listing_is_ordered_by_step_and_skips_what_is_not_whole(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "junk").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "step-9" / "state.json").write_bytes(b"")
    assert [checkpoint.meta["step"] for checkpoint in list_checkpoints(tmp_path)] == [10, 100]
    assert list_checkpoints(tmp_path / "nothing-here") == []


def test_latest_valid_passes_over_damaged_ones_and_says_so(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-3" / "adapter.safetensors").write_bytes(b"x" * 700)
    (tmp_path / "step-2" / "state.json").unlink()
    said = []
    assert latest_valid(tmp_path, say=said.append).meta["step"] == 1
    assert sorted(line.split(": ")[1].split()[0] for line in said) == ["adapter.safetensors", "state.json"]


def test_rotation_keeps_the_newest_the_named_and_every_other_runs(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    save(tmp_path, 1, owner="run-b", name="b-1")
    write_folder(tmp_path / "nobody", {"f": b""}, meta={"step": 0})
    assert rotate(tmp_path, 2, {"step-1"}, owner="run-a") == ["step-2", "step-3"]
    assert sorted(os.listdir(tmp_path)) == ["b-1", "nobody", "step-1", "step-4", "step-5"]
    assert rotate(tmp_path, 2, {"step-1"}, owner="run-a") == []
    write_folder(tmp_path / "nobody-2", {"f": b""}, meta={"step": 1})
    assert rotate(tmp_path, 1, owner=None) == ["nobody"]
    with pytest.raises(UsageError, match="keep_last=0"):
        rotate(tmp_path, 0, owner="run-a")


def test_rotation_never_deletes_the_last_verified_checkpoint(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):  # right in size, wrong in content: only hashing tells
        (tmp_path / f"step-{step}" / "adapter.safetensors").write_bytes(b"x" * 700)
    assert rotate(tmp_path, 2, owner="run-a") == ["step-1"]
    assert latest_valid(tmp_path).meta["step"] == 2
    (tmp_path / "step-2" / "adapter.safetensors").write_bytes(b"x" * 700)
    assert rotate(tmp_path, 1, owner="run-a") == []


def test_rotation_renames_before_it_deletes(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    disk = Watched()
    rotate(tmp_path, 1, owner="run-a", disk=disk)
    first, *rest = disk.calls
    assert first[0] == "rename" and first[1].name == "step-1" and first[2].name.startswith(".del-step-1-")
    assert [name for name, *_ in rest] == ["unlink"] * 4 + ["rmdir"]
    assert all(".del-step-1-" in str(call[1]) for call in rest)


def leftover(root: Path, kind: str, mark: ProcessMark, name: str = "step-1") -> Path:
    path = root / f".{kind}-{name}-{mark.pid}-{mark.start}-{mark.host}-0123abcd"
    path.mkdir()
    (path / "part").write_text("x")
    return path


def test_sweeping_removes_leftovers_of_dead_processes_only(tmp_path):
    me = ProcessMark.current()
    dead = run_code("m = ProcessMark.current(); print(m.pid, m.start, m.host)").out.decode().split()
    gone = leftover(tmp_path, "tmp", ProcessMark(int(dead[0]), int(dead[1]), dead[2]))
    reused = leftover(tmp_path, "del", ProcessMark(me.pid, me.start - 100, me.host))
    alive = leftover(tmp_path, "tmp", me, name="step-2")
    elsewhere = leftover(tmp_path, "tmp", ProcessMark(1, 5, "00000000"))
    foreign = tmp_path / ".tmp-someone-elses"
    foreign.mkdir()
    save(tmp_path, 1)
    assert sorted(sweep(tmp_path)) == sorted([gone.name, reused.name])
    assert alive.exists() and elsewhere.exists() and foreign.exists()
    assert [checkpoint.name for checkpoint in list_checkpoints(tmp_path)] == ["step-1"]
    assert sweep(tmp_path / "nothing-here") == []


def test_removing_a_leftover_never_follows_a_link_in_it(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years")
    me = ProcessMark.current()
    path = leftover(tmp_path, "tmp", ProcessMark(me.pid, me.start - 100, me.host))
    (path / "link").symlink_to(outside)
    path.with_name(path.name.replace("step-1", "step-2")).symlink_to(outside)
    assert len(sweep(tmp_path)) == 2
    assert hidden(tmp_path) == [] and (outside / "thesis.tex").read_text() == "years"


def test_leftovers_of_another_host_are_swept_after_a_day(tmp_path, monkeypatch):
    leftover(tmp_path, "tmp", ProcessMark(1, 5, "00000000"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 23 * 3600)
    assert sweep(tmp_path) == []
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert len(sweep(tmp_path)) == 1


def test_an_interrupted_overwrite_is_undone_by_whoever_looks_next(tmp_path):
    for number, look in enumerate((lambda r: read_folder(r / "best"), list_checkpoints, latest_valid, sweep)):
        root = tmp_path / str(number)
        save(root, 1, name="best")
        mark = ProcessMark.current()
        os.rename(root / "best", root / f".old-best-{mark.pid}-{mark.start - 9}-{mark.host}-00000000")
        look(root)
        assert read_folder(root / "best").meta["step"] == 1


def test_a_writer_puts_back_what_its_own_process_left_aside_before_it_tries_again(tmp_path):
    save(tmp_path, 1, name="best")
    mark = ProcessMark.current()
    os.rename(tmp_path / "best", tmp_path / f".old-best-{mark.pid}-{mark.start}-{mark.host}-00000000")
    assert list_checkpoints(tmp_path) == []  # a save of this very process may be between its two renames

    def before(n, name, args):
        if name == "create":
            raise OSError(errno.ENOSPC, "x")

    with pytest.raises(CheckpointError):
        save(tmp_path, 2, name="best", overwrite=True, disk=Watched(before=before))
    assert read_folder(tmp_path / "best").meta["step"] == 1


def test_the_newest_of_two_folders_put_aside_comes_back(tmp_path):
    mark = ProcessMark.current()
    for step, pid in ((1, "0" * 8), (2, "f" * 8), (3, "1" * 8)):
        path = save(tmp_path / "elsewhere", step)
        time.sleep(0.01)
        os.rename(path, tmp_path / f".old-best-{mark.pid}-{mark.start - 9}-{mark.host}-{pid}")
    assert read_folder(tmp_path / "best").meta["step"] == 3


def test_replacing_one_file_is_atomic_and_synced(tmp_path):
    path = tmp_path / "run.json"
    disk = Watched()
    replace_file(path, b"one", disk=disk)
    assert [name for name, *_ in disk.calls] == ["create", "write", "fsync", "close", "replace", "fsync_dir"]
    for at in range(1, 5):

        def before(n, name, args, at=at):
            if n == at:
                raise OSError(errno.ENOSPC, "x")

        with pytest.raises(CheckpointError, match="needs 5 bytes"):
            replace_file(path, b"three", disk=Watched(before=before))
        assert path.read_bytes() == b"one" and hidden(tmp_path) == []


# locks


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path):
    holder = start("hold-lock", tmp_path)
    assert holder.stdout.readline() == b"held\n"
    lock = FolderLock(tmp_path)
    assert lock.held()
    with pytest.raises(StateError, match=f"in use by process {holder.pid} since"):
        lock.acquire()
    holder.kill()
    holder.communicate()
    assert not lock.held()
    with lock.acquire():
        assert lock.held()
        with pytest.raises(StateError, match=f"in use by process {os.getpid()}"):
            FolderLock(tmp_path).acquire()
        with pytest.raises(StateError, match="already locked by this object"):
            lock.acquire()
    assert not lock.held() and not FolderLock(tmp_path).held()
    with FolderLock(tmp_path) as again:
        assert again.held()


def test_a_lock_may_be_released_by_another_thread(tmp_path):
    lock = FolderLock(tmp_path).acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    FolderLock(tmp_path).acquire().release()


def test_a_stale_holder_file_does_not_name_a_dead_process(tmp_path):
    FolderLock(tmp_path).acquire().release()
    me = ProcessMark.current()
    with FolderLock(tmp_path):
        (tmp_path / ".lock-holder").write_bytes(
            dump_json({"pid": me.pid, "start": me.start - 5, "host": me.host, "since": "then"})
        )
        with pytest.raises(StateError, match="in use by another process"):
            FolderLock(tmp_path).acquire()


def test_a_process_mark_tells_a_reused_pid_and_a_zombie_from_the_process():
    me = ProcessMark.current()
    assert not me.gone
    assert ProcessMark(me.pid, me.start + 1, me.host).gone
    assert not ProcessMark(me.pid, 0, me.host).gone
    assert not ProcessMark(me.pid, me.start + 1, "00000000").gone
    process = subprocess.Popen(["sleep", "0"], stdin=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert ProcessMark(process.pid, 0, me.host).gone
    process.wait()


# fuzzing


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.binary(min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_manifests_are_refused_and_never_crash_or_lie(fuzzed, edits):
    path, original = fuzzed
    data = bytearray(original)
    for place, kind, values in edits:
        at = int(place * len(data))
        data[at : at + {"set": len(values), "cut": 5, "insert": 0}[kind]] = b"" if kind == "cut" else values
    (path / MANIFEST).write_bytes(bytes(data))
    try:
        found = read_folder(path)
    except CheckpointError as error:
        assert str(path) in str(error) and bytes(data) != original
    else:
        assert bytes(data) == original and found.meta["step"] == 1


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    path = save(tmp_path_factory.mktemp("fuzz"), 1)
    return path, (path / MANIFEST).read_bytes()


@settings(max_examples=300, deadline=None)
@given(name=st.text(max_size=12) | st.from_regex(r"\.{0,2}[/\\]?[A-Za-z0-9._-]{0,6}(/\.\.)?", fullmatch=True))
def test_a_name_that_passes_is_one_component_below_its_root(name):
    root = Path("/somewhere/root")
    try:
        passed = check_name(name)
    except UsageError:
        return
    assert (
        passed == name and Path(os.path.normpath(root / name)).parent == root and len((root / name).name) == len(name)
    )


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40) | st.text(alphabet='{}[]",:0129.eE-+ntfuaNIy \n', max_size=40).map(str.encode))
def test_any_bytes_are_json_that_comes_back_the_same_or_a_value_error(data):
    try:
        value = parse_json(data)
    except ValueError:
        return
    if isinstance(value, dict | list):
        try:
            assert parse_json(dump_json(value)) == value
        except CheckpointError as error:  # a number too large for a float reads as infinity
            assert "infinity" in str(error)

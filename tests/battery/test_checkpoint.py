"""The full sizes of the tests of saved folders: kills, bit flips, truncations, full disks, every error everywhere."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path

import pytest

_path = Path(__file__).parents[1] / "checkpoint_tools.py"
_spec = importlib.util.spec_from_file_location("checkpoint_tools", _path)
tools = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tools)

pytestmark = pytest.mark.battery


def test_200_random_kills_lose_nothing_acknowledged(tmp_path):
    tools.run_parallel([lambda i=i: tools.random_kills(tmp_path / str(i), 50, 100 + i) for i in range(4)])


def test_any_of_500_flipped_bits_is_refused_with_the_file_named(tmp_path):
    tools.flip_bits(tmp_path, 500, seed=11)


def test_100_truncations_zero_fills_and_extensions_are_refused_with_the_file_named(tmp_path):
    tools.damage_lengths(tmp_path, 100, seed=12)


@pytest.mark.parametrize("number", tools.ERRNOS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
def test_every_error_at_every_system_call_is_typed_and_a_retry_succeeds(tmp_path, number, overwrite, forever):
    tools.fail_everywhere(tmp_path, number, overwrite=overwrite, forever=forever)


@pytest.mark.parametrize("announce", [True, False], ids=["known-size", "unknown-size"])
def test_50_sizes_around_a_full_disk_leave_the_old_checkpoint_and_no_leftovers(tmp_path, announce):
    # Of 32 pages of 4 KiB the old checkpoint takes 4 and the new manifest 1.
    edge = 27 * 4096
    sizes = [edge - 1024 + number * 42 for number in range(50)]
    with tools.small_disks(tmp_path) as mount:
        fitted = [tools.fill_small_disk(mount(128), size, announce=announce) for size in sizes]
    assert fitted == [size <= edge for size in sizes]

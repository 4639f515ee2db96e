import pytest
import torch

from local_tinker.sampler.rows import PageTables, most_entries, most_readers, table_shape


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("positions", [100, 4096])
def test_tables_made_for_the_most_hold_every_shape_without_moving(group, positions):
    rows, readers = 24, most_readers(group)
    tables = PageTables(torch.device("cpu"), rows=rows, positions=positions)
    assert tables._flat.numel() == 0  # a CPU captures nothing
    tables._flat = torch.zeros(most_entries(rows, positions), dtype=torch.int32)
    for count in (1, 7, rows):
        for prefixes in (0, 1, count):
            shape = table_shape(
                count,
                prefixes,
                own_tokens=positions,
                prefix_tokens=positions,
                readers=readers,
                kv_heads=2,
                head_bytes=256,
                processors=132,
                fixed=False,
            )
            assert not tables.fill(shape, [])
    small = PageTables(torch.device("cpu"), rows=rows, positions=positions)
    assert small.fill(shape, []) and not small.fill(shape, [])


def splits(rows, prefixes, kv_heads, head_bytes=256, own=512, prefix=512):
    shape = table_shape(
        rows,
        prefixes,
        own_tokens=own,
        prefix_tokens=prefix,
        readers=8,
        kv_heads=kv_heads,
        head_bytes=head_bytes,
        processors=132,
        fixed=False,
    )
    return shape.own_split, shape.prefix_split


def test_beside_shared_prompts_there_are_as_many_programs_as_keep_the_memory_busy():
    assert splits(256, 32, 4) == (512, 512)
    assert splits(64, 8, 8) == (512, 256)
    assert splits(8, 1, 8) == (256, 128)
    assert splits(16, 2, 8, head_bytes=128) == (256, 128)  # narrow heads ask for twice as many of a row's own
    assert splits(256, 32, 8, head_bytes=128) == (512, 256) and splits(256, 32, 8) == (512, 512)


def test_rows_alone_are_read_by_one_program_a_head_where_there_are_enough_of_them():
    assert splits(64, 0, 8, own=1024) == (1024, 128)
    assert splits(64, 0, 8, head_bytes=128, own=1024) == (1024, 128)
    assert splits(48, 0, 4, own=1024) == (1024, 128)
    assert splits(32, 0, 4, own=1024) == (128, 128)
    assert splits(1, 0, 8, own=1024) == (64, 128)

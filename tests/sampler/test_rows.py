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
                processors=132,
                fixed=False,
            )
            assert not tables.fill(shape, [])
    small = PageTables(torch.device("cpu"), rows=rows, positions=positions)
    assert small.fill(shape, []) and not small.fill(shape, [])

"""Which kernels may be sent out before the one ahead of them ends. What that does is seen on a card: tests/gpu."""

from types import SimpleNamespace

import pytest
import torch

from local_tinker.model.kernels import dependent, nf4_rows
from local_tinker.model.linear import NF4Weight


@pytest.mark.parametrize("rows", [1, nf4_rows.EARLY_ROWS, nf4_rows.EARLY_ROWS + 1])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("able", [False, True])
def test_the_four_bit_product_goes_early_in_recorded_steps_of_few_rows(able, capturing, rows, monkeypatch):
    """Outside a recorded step its weights might be what the kernel ahead is writing."""
    sent = []
    kernel = SimpleNamespace(launch=lambda programs, *args, dependent: sent.append(dependent))
    monkeypatch.setattr(nf4_rows, "_kernel", lambda *instance: kernel)
    monkeypatch.setattr(nf4_rows, "_shape", lambda *sizes: (1, 1))
    monkeypatch.setattr(nf4_rows, "launches_early", lambda device: able)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    weight = NF4Weight(torch.randn(16, 64, dtype=torch.bfloat16))
    nf4_rows.nf4_rows(torch.zeros(rows, 64, dtype=torch.bfloat16), [(weight.stored, weight.state)], None, None)
    assert sent == [able and capturing and rows <= nf4_rows.EARLY_ROWS]


@pytest.mark.parametrize(
    ("capability", "driver", "interpret", "early"),
    [((9, 0), 12030, "0", True), ((8, 9), 13000, "0", False), ((9, 0), 12020, "0", False), ((9, 0), 13000, "1", False)],
)
def test_cards_and_drivers_that_send_kernels_out_early(capability, driver, interpret, early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(dependent, "driver_version", lambda: driver)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert dependent.launches_early.__wrapped__("cuda") == early
    assert not dependent.launches_early.__wrapped__("cpu")

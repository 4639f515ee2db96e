"""The order in which parking makes two streams wait for each other; that copies are right is tested on a card."""

from contextlib import nullcontext

import pytest
import torch

from local_tinker.model import offload
from local_tinker.model.layer import DecoderPass
from local_tinker.model.offload import Parked, Parking
from tests.model.families import empty_sink, random_pairs, random_tokens, tiny
from tests.model.test_layer import COUNT, EDGES, road_of, run


class Stream:
    """Notes what it is told, as a CUDA stream would do it, in order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"{self.name} event {self.events}")
        return f"{self.name} event {self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch):
    log: list[str] = []
    side, main = Stream("side", log), Stream("main", log)
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(offload.torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return side, log


def test_memory_is_given_back_after_the_copy_and_taken_before_the_way_back(streams):
    side, log = streams
    tensor = torch.arange(6.0)
    parked = Parked(tensor, Parking(side))
    assert log == ["side waits for main", "side event 1"]
    assert parked._here is tensor  # until its memory may go
    parked.leave()
    assert log.pop() == "main waits for side event 1" and parked._here is None
    parked.fetch()
    parked.fetch()
    assert log[2:] == ["side waits for main", "side event 2"]
    back = parked.get()
    assert log[4:] == ["main waits for side event 2"]
    assert torch.equal(back, tensor) and back.data_ptr() != tensor.data_ptr()


def test_what_is_wanted_at_once_is_fetched_and_waited_for(streams):
    side, log = streams
    parked = Parked(torch.ones(3), Parking(side))
    parked.leave()
    parked.get()
    assert log[-3:] == ["side waits for main", "side event 2", "main waits for side event 2"]


@pytest.mark.parametrize("where", ["_mlp_in_tiles", "_layer_backward"])
def test_a_pass_that_is_abandoned_lets_the_computing_stream_wait_for_the_copies(streams, monkeypatch, where):
    side, log = streams
    road, frozen = road_of(tiny("llama"))
    pairs = random_pairs(frozen)
    real = getattr(DecoderPass, where)

    def fail(self, *args, **options):
        if log.count("side waits for main") > (1 if where == "_mlp_in_tiles" else road.spec.layers):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **options)

    lot = Parking(side)

    def park(self, h):
        self._parking = lot
        return Parked(h, lot)

    monkeypatch.setattr(DecoderPass, "_park", park)
    monkeypatch.setattr(DecoderPass, where, fail)
    levels = ("offload",) * road.spec.layers
    with pytest.raises(torch.OutOfMemoryError):
        run(road, random_tokens(COUNT), EDGES, pairs=pairs, sink=empty_sink(pairs), levels=levels).sum().backward()
    assert log[-1] == "main waits for side" and log[-2].startswith("side event")


def test_without_a_stream_it_stays():
    tensor = torch.ones(3)
    parked = Parked(tensor, None)
    parked.leave()
    parked.fetch()
    assert parked.get() is tensor


def test_a_buffer_serves_the_next_state_once_the_way_back_is_queued(streams):
    side, _ = streams
    lot = Parking(side)
    first, second = (torch.arange(6.0) * i for i in (1, 2))
    one, two = Parked(first, lot), Parked(second, lot)
    buffer, other = one._buffer, two._buffer
    assert buffer.data_ptr() != other.data_ptr() and buffer.numel() == 32  # pinned memory comes in powers of two
    for parked in (one, two):
        parked.leave()
    back = one.get()
    smaller = Parked(torch.ones(2, 2), lot)
    assert smaller._buffer is buffer and torch.equal(back, first)
    larger = Parked(torch.ones(9), lot)
    assert larger._buffer.numel() == 64 and torch.equal(two.get(), second)
    again = Parked(torch.zeros(3), lot)
    assert again._buffer is other  # the smallest that is free and large enough
    for parked, value in ((smaller, torch.ones(2, 2)), (larger, torch.ones(9)), (again, torch.zeros(3))):
        parked.leave()
        assert torch.equal(parked.get(), value)


@pytest.mark.parametrize("steps", [3])
def test_micro_batches_pin_as_many_buffers_as_layers_are_parked(streams, monkeypatch, steps):
    side, _ = streams
    road, frozen = road_of(tiny("llama"))
    pairs, lot, made = random_pairs(frozen), Parking(side), []
    take = offload.torch.empty

    def counted(*size, **options):
        made.append(size) if options.get("dtype") is torch.uint8 else None
        return take(*size, **options)

    monkeypatch.setattr(offload.torch, "empty", counted)
    monkeypatch.setattr(DecoderPass, "_park", lambda self, h: Parked(h, lot))
    sinks = [empty_sink(pairs) for _ in range(steps + 1)]
    for sink, level in zip(sinks, ("layer", *["offload"] * steps), strict=True):
        levels = (level,) * road.spec.layers
        run(road, random_tokens(COUNT), EDGES, pairs=pairs, sink=sink, levels=levels).sum().backward()
    assert len(made) == road.spec.layers == len(lot._free)
    for sink in sinks[1:]:
        for path, gradients in sink.items():
            assert all(torch.equal(a, b) for a, b in zip(gradients, sinks[0][path], strict=True))

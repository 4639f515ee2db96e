"""The order in which parking makes two streams wait for each other; that copies are right is tested on a card."""

from contextlib import nullcontext

import pytest
import torch

from local_tinker.model import offload
from local_tinker.model.layer import DecoderPass
from local_tinker.model.offload import Parked
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
    parked = Parked(tensor, side)
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
    parked = Parked(torch.ones(3), side)
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

    def park(self, h):
        self._stream = side
        return Parked(h, side)

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

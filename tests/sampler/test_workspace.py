"""The order of things while a step is captured; that captured steps are right is tested on a card."""

from contextlib import contextmanager
from itertools import count

import pytest
import torch

from local_tinker.sampler import workspace
from local_tinker.sampler.workspace import StepKind, Workspace
from tests.model.test_offload import Stream
from tests.sampler.toy import ToyRoad, engine


class Graph:
    pools: list = []

    def capture_begin(self, *, pool, **_):
        self.pools.append(pool)

    def capture_end(self):
        pass


@pytest.fixture
def card(monkeypatch):
    """-> a workspace whose device has streams and graphs on paper, what they were told, and the streams there are."""
    log: list[str] = []
    main, made = Stream("main", log), []

    def stream(device=None):
        made.append(Stream(f"side {len(made)}", log))
        return made[-1]

    @contextmanager
    def within(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    pools = count(1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(pools)))
    workspace._capture_stream.cache_clear()
    work = engine(ToyRoad()).take(4)
    work.rows.state.alive.fill_(1)
    yield work, log, made
    workspace._capture_stream.cache_clear()


def kind(rows):
    return StepKind(workspace.TableShape(rows, 1, 0, 1, 1, 64, 64, False), False)


def steps_that(monkeypatch, *outcomes):
    """Steps that go well (None) or raise, one after the other; the rows' `alive` at each."""
    seen, outcomes = [], list(outcomes)

    def step(self, kind):
        seen.append(self.rows.state.alive[: kind.shape.rows].tolist())
        self.out.at.add_(1)
        error = outcomes.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(Workspace, "_step", step)
    return seen


def test_all_captures_run_on_one_stream_and_leave_the_rows_as_they_were(card, monkeypatch):
    work, log, made = card
    seen = steps_that(monkeypatch, *[None] * 4)
    work._capture(kind(2))
    work._capture(kind(3))
    assert len(made) == 1
    assert log == ["side 0 waits for main", "on side 0", "off", "main waits for side 0"] * 2
    assert seen == [[0, 0], [0, 0], [0, 0, 0], [0, 0, 0]]  # run once, then recorded, while the rows stand still
    assert work.rows.state.alive.all() and int(work.out.at) == 0


def test_steps_that_still_run_are_done_before_the_stream_that_recorded_them(card, monkeypatch):
    work, log, _ = card
    monkeypatch.setattr(Graph, "replay", lambda self: None, raising=False)
    steps_that(monkeypatch, None, None)
    work.forget_steps()
    assert log == []  # nothing was recorded
    work._captured(kind(2))
    work.forget_steps()
    assert log[-2:] == ["main waits for side 0", "side 0 waits for main"]


@pytest.mark.parametrize("good", [0, 1])
def test_what_a_failed_capture_worked_on_is_freed_after_its_stream_is_done(card, monkeypatch, good):
    work, log, _ = card
    steps_that(monkeypatch, *[None] * good, ValueError("not finite"))
    with pytest.raises(ValueError, match="not finite"):
        work._captured(kind(2))
    assert log[-1] == "main waits for side 0"
    assert work.rows.state.alive.all() and int(work.out.at) == 0


def test_a_step_that_finds_no_memory_is_recorded_again_after_the_unused_was_returned(card, monkeypatch):
    work, log, _ = card
    monkeypatch.setattr(workspace, "give_back", lambda: log.append("give back"))
    monkeypatch.setattr(Graph, "replay", lambda self: None, raising=False)
    full = torch.OutOfMemoryError("CUDA out of memory")
    seen = steps_that(monkeypatch, None, full, None, None)
    work._captured(kind(2))
    assert log.index("give back") == 1 + log.index("main waits for side 0") and len(seen) == 4
    first, second = Graph.pools[-2:]
    assert first != second  # no graph was left in the first one, and torch takes up no pool without
    steps_that(monkeypatch, None, full, None, full)  # then the run goes on with less
    with pytest.raises(torch.OutOfMemoryError):
        work._captured(kind(3))
    assert Graph.pools[-2:] == [second, second]
    assert log.count("give back") == 2

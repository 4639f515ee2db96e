import io

import pytest

from local_tinker.data.preflight import preflight, render
from local_tinker.data.prepare import Prepared, check_rows, to_units
from local_tinker.errors import DatasetError
from local_tinker.types import Datum, ModelInput


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_the_example_shows_exactly_the_trained_tokens(renderer_of):
    renderer = renderer_of("strict")
    lines = preflight(to_units([chat("Hi", "Hello!")], renderer=renderer), renderer=renderer).lines()
    assert "\n".join(lines[-4:]) == "<bos><turn>user\nHi</turn>\n<turn>model\n[[Hello!</turn>]]"
    assert "last trained token is a stop token: 1 of 1" in lines
    assert "chat template: model" in lines


def datum(length, trained, last=3):
    targets = [3] * (length - 2) + [last]
    weights = [0.0] * (length - 1 - trained) + [1.0] * trained
    return Datum(ModelInput.from_ints([3] * (length - 1)), {"target_tokens": targets, "weights": weights})


def test_lengths_shares_and_counts_are_over_all_sequences(renderer_of):
    renderer = renderer_of("chatml")
    units = [(datum(length, 1, last=renderer.eos_id if length != 7 else 3),) for length in range(2, 22)]
    report = preflight(Prepared(units, list(range(20)), dropped=3, truncated=2), renderer=renderer)
    # Lengths 2..21: the lower middle is the 10th, the 95th percentile the 19th of 20.
    size = report.lengths
    assert (size.shortest, size.median, size.p95, size.longest) == (2, 11, 20, 21)
    assert (report.tokens, report.trained_tokens) == (sum(range(2, 22)), 20)
    assert report.trained_share == pytest.approx(20 / 230)
    assert (report.kept, report.dropped, report.truncated, report.stopped) == (20, 3, 2, 19)
    assert any("19 of 20  <- the model may not learn to stop" in line for line in report.lines())
    assert report.lines()[0] == "rows: 20 kept, 2 with a shortened prompt, 3 dropped as too long"


def test_nothing_left_is_an_error(renderer_of):
    renderer = renderer_of("chatml")
    with pytest.raises(DatasetError, match="nothing left.*1 rows dropped"):
        preflight(check_rows([chat("a", "b")], renderer=renderer, max_length=3), renderer=renderer)


def test_the_rich_rendering_without_colour_says_the_same(renderer_of):
    console = pytest.importorskip("rich.console")
    renderer, out = renderer_of("chatml"), io.StringIO()
    report = preflight(to_units([chat("Hi", "Hello!")], renderer=renderer), renderer=renderer)
    console.Console(file=out, width=200, no_color=True).print(render(report))
    assert [line.rstrip() for line in out.getvalue().splitlines()] == report.lines()


def test_a_long_example_keeps_the_ends_of_every_run_in_sight(renderer_of):
    renderer = renderer_of("chatml")
    report = preflight(to_units([chat("Hi " * 2000, "Hello! " * 2000)], renderer=renderer), renderer=renderer)
    text = "\n".join(report.lines())
    assert len(text) < 2500
    assert "<|im_end|>]]" in text and "[[Hello!" in text

"""`chat`: a conversation over a pipe, its commands, and Ctrl-C in the middle of an answer."""

import io

import pytest

from local_tinker.cli import app, chat


class Echo:
    """A sampler that answers with the number of messages it was given."""

    def __init__(self):
        self.asked = []

    def stream(self, messages, **settings):
        self.asked.append([dict(message) for message in messages])
        yield "answer "
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt
        yield f"{len(messages)}"


@pytest.fixture
def talk(monkeypatch, capsys):
    sampler = Echo()
    monkeypatch.setattr(chat, "open_sampler", lambda *args, **kwargs: sampler)

    def say(text, *words):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = app.main(["chat", "any", *words])
        return code, *capsys.readouterr(), sampler.asked

    return say


def test_lines_of_a_pipe_are_a_conversation_with_its_history(talk):
    code, out, _, asked = talk("one\n\ntwo\n")
    assert (code, out) == (0, "answer 1\nanswer 3\n")
    assert [message["content"] for message in asked[1]] == ["one", "answer 1", "two"]


def test_reset_forgets_all_but_the_system_message(talk):
    _, out, err, asked = talk("one\n/reset\ntwo\n", "--system", "Be kind.")
    assert out == "answer 2\nanswer 2\n" and "(forgotten)" in err
    assert asked[1] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]


def test_quit_leaves_and_an_unknown_command_is_not_sent(talk):
    code, out, err, asked = talk("/quti\n/quit\nnever\n")
    assert (code, out, asked) == (0, "", []) and "no command /quti" in err


def test_an_interrupt_stops_the_answer_only_and_keeps_what_came(talk):
    code, out, err, asked = talk("stop me\ngo on\n")
    assert code == 0 and "(stopped)" in err and out == "answer \nanswer 3\n"
    assert asked[1][1] == {"role": "assistant", "content": "answer "}


def test_the_streamed_answer_of_a_model_is_what_sample_gives(tiny_model, service, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("dog?\n"))
    assert app.main(["chat", str(tiny_model), "--temperature", "0", "--max-tokens", "9", "--quantize", "none"]) == 0
    sampler = service.create_sampling_client(tiny_model, quantize=None)
    expected = sampler.sample([{"role": "user", "content": "dog?"}], temperature=0, max_tokens=9)
    assert capsys.readouterr().out == expected + "\n"


def test_a_conversation_that_outgrows_the_context_is_said_and_can_be_reset(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("long " * 400 + "\n/reset\ndog?\n"))
    assert app.main(["chat", str(tiny_model), "--temperature", "0", "--max-tokens", "4", "--quantize", "none"]) == 0
    out, err = capsys.readouterr()
    assert "/reset starts anew" in err and len(out.splitlines()) == 1


def test_settings_out_of_range_end_with_code_2_before_a_model_is_loaded(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    monkeypatch.setattr("local_tinker.ServiceClient.create_sampling_client", None)
    for words, says in ((["--max-tokens", "0"], "max_tokens must be 1"), (["--temperature", "-1"], "temperature must")):
        assert app.main(["chat", str(tiny_model), *words]) == 2
        assert says in capsys.readouterr().err

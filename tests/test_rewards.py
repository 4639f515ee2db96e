import math
import os
import re
import threading
import time

import pytest

from local_tinker.errors import MissingDependencyError, UsageError
from local_tinker.rewards import (
    exact_match,
    extract_code,
    extract_number,
    extract_tag,
    math_match,
    number_match,
    regex_match,
    reward,
    run_python,
    score_batch,
    tag_format,
    unit_tests,
)
from local_tinker.types import Completion, Rollout

MESSAGES = [{"role": "user", "content": "2+2?"}]


def completion(text, tokens=(5, 6)):
    return Completion(
        text,
        tokens=tokens,
        logprobs=[-1.0] * len(tokens),
        prompt_tokens=[1],
        stop_reason="stop",
        weights_version="a/0",
    )


class TestReward:
    def test_the_loop_of_the_readme_works_for_completions_and_for_groups(self):
        reward_fn = reward(lambda prompt, completion: float(len(prompt) + len(completion)))
        prompts = ["a", "bb"]
        assert [reward_fn(p, c) for p, c in zip(prompts, ["x", "yyy"], strict=True)] == [2.0, 5.0]
        grouped = [["x", "yy"], ["", "z"]]
        assert [reward_fn(p, c) for p, c in zip(prompts, grouped, strict=True)] == [[2.0, 3.0], [2.0, 3.0]]

    def test_it_decorates_and_does_not_wrap_twice(self):
        @reward
        def length(completion):
            return float(len(completion))

        assert length("p", "abc") == 3.0
        assert length.__name__ == "length"
        assert reward(length) is length

    @pytest.mark.parametrize(
        "fn",
        [
            lambda completion: float(completion == "4"),
            lambda text: float(text == "4"),
            lambda prompt, completion: float(completion == "4" and prompt == "2+2?"),
            lambda completion, prompt: float(completion == "4" and prompt == "2+2?"),
            lambda question, response: float(response == "4" and question == "2+2?"),
            lambda *args: float(args == ("2+2?", "4")),
            lambda completion, tolerance=1: float(completion == "4" and tolerance == 1),
            lambda completion, /: float(completion == "4"),
        ],
    )
    def test_a_function_of_one_completion_gets_what_it_asks_for(self, fn):
        assert reward(fn)("2+2?", "4") == 1.0
        assert reward(fn)("2+2?", ["4", "5"]) == [1.0, 0.0]

    def test_columns_reach_the_parameters_that_are_named_like_them(self):
        assert reward(lambda completion, answer: float(completion == answer))("p", ["4", "5"], answer="4") == [1.0, 0.0]
        assert reward(lambda text, answer: float(text == answer))("p", "4", answer="4") == 1.0
        assert reward(lambda completion: 1.0)("p", "4", answer="4") == 1.0

    def test_a_column_the_function_needs_and_lacks_is_an_error(self):
        with pytest.raises(UsageError, match="needs 'answer', which is no column of the rows"):
            reward(lambda completion, answer: 1.0)("p", "4")

        def batched(completions, solution):
            return [1.0 for _ in completions]

        with pytest.raises(UsageError, match="batched needs 'solution'.*completions, prompts"):
            reward(batched)("p", "4")

    def test_a_function_with_completions_is_called_the_way_trl_calls_it(self):
        seen = {}

        def trl_style(prompts, completions, solution, **kwargs):
            seen.update(prompts=prompts, completions=completions, solution=solution, **kwargs)
            return [float(c == s) for c, s in zip(completions, solution, strict=True)]

        group = [completion("4", (7,)), completion("5", (8, 9))]
        assert reward(trl_style)("2+2?", group, solution="4", level=3) == [1.0, 0.0]
        assert seen == {
            "prompts": ["2+2?", "2+2?"],
            "completions": ["4", "5"],
            "solution": ["4", "4"],
            "level": [3, 3],
            "completion_ids": [[7], [8, 9]],
        }

    def test_messages_as_prompts_make_answers_messages_for_trl_functions(self):
        def trl_style(completions, **kwargs):
            return [float(c[0]["content"] == "4" and c[0]["role"] == "assistant") for c in completions]

        assert reward(trl_style)(MESSAGES, [completion("4"), completion("5")]) == [1.0, 0.0]
        assert reward(lambda completion: float(completion == "4"))(MESSAGES, completion("4")) == 1.0
        rollout = Rollout((1,), (2,), (True,), (-1.0,), "stop", "a/0")
        with pytest.raises(UsageError, match="a Rollout has no text"):
            reward(trl_style)(MESSAGES, rollout)

    def test_functions_without_kwargs_get_only_what_they_name(self):
        assert reward(lambda completions: [1.0] * len(completions))("p", ["a", "b"], answer="x") == [1.0, 1.0]

    def test_an_async_function_is_awaited(self):
        async def slow(completions, **kwargs):
            return [float(len(c)) for c in completions]

        assert reward(slow)("p", ["a", "bb"]) == [1.0, 2.0]

    def test_a_callable_object_is_a_reward_function(self):
        class Length:
            def __call__(self, completion):
                return float(len(completion))

        assert reward(Length())("p", "abc") == 3.0
        assert reward(len)("p", "abc") == 3.0
        with pytest.raises(UsageError, match="must be callable, got str"):
            reward("length")

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (None, "is None: a reward is a number .does the reward function return"),
            (math.nan, "is nan"),
            (math.inf, "is inf"),
            (True, "is True .a bool."),
            ("1", "is '1' .str."),
            ([1.0], "is .1.0. .list."),
        ],
        ids=str,
    )
    def test_what_is_no_number_is_an_error_that_names_function_and_place(self, bad, words):
        def scorer(completion):
            return bad if completion == "b" else 0.0

        with pytest.raises(UsageError, match=f"what scorer returned for completion 1 {words}"):
            reward(scorer)("p", ["a", "b"])

    def test_an_error_of_the_function_says_for_which_completion(self):
        def scorer(completion):
            return {"a": 1.0}[completion]

        with pytest.raises(KeyError) as caught:
            reward(scorer)("p", ["a", "b"])
        assert caught.value.__notes__ == ["in reward scorer, for completion 1: 'b'"]

    def test_a_trl_function_may_leave_a_completion_unscored(self):
        assert reward(lambda completions: [None, 1])("p", ["a", "b"]) == [None, 1.0]

    @pytest.mark.parametrize(
        ("returned", "words"),
        [
            ([1.0], "returned 1 rewards for 2 completions"),
            (1.0, "returned 1.0 for 2 completions"),
            (None, "returned None for 2 completions"),
            ([1.0, math.nan], "returned at 1 is nan"),
            ([True, 1.0], "returned at 0 is True"),
        ],
        ids=str,
    )
    def test_a_trl_function_that_returns_something_else_is_an_error(self, returned, words):
        with pytest.raises(UsageError, match=words):
            reward(lambda completions: returned)("p", ["a", "b"])

    def test_errors_of_the_function_come_through(self):
        with pytest.raises(ZeroDivisionError):
            reward(lambda completion: 1 / 0)("p", "a")


class TestScoreBatch:
    def test_rewards_are_nested_like_the_completions(self):
        fn = lambda prompt, completion, answer: float(completion == answer)  # noqa: E731
        columns = {"answer": ["x", "y"]}
        assert score_batch(fn, ["a", "b"], [["x", "y"], ["y", "y"]], columns=columns) == [[1.0, 0.0], [1.0, 1.0]]
        assert score_batch(fn, ["a", "b"], ["x", "x"], columns=columns) == [1.0, 0.0]

    def test_a_trl_function_is_called_once_with_everything(self):
        calls = []

        def trl_style(prompts, completions, answer):
            calls.append((prompts, answer))
            return [float(len(c)) for c in completions]

        got = score_batch(trl_style, ["a", "b"], [["x", "yy"], ["zzz"]], columns={"answer": [1, 2]})
        assert got == [[1.0, 2.0], [3.0]]
        assert calls == [(["a", "a", "b"], [1, 1, 2])]

    def test_counts_that_differ_are_an_error(self):
        with pytest.raises(UsageError, match="got 1 completions for 2 prompts"):
            score_batch(len, ["a", "b"], ["x"])
        with pytest.raises(UsageError, match="got 3 answer for 2 prompts"):
            score_batch(len, ["a", "b"], ["x", "y"], columns={"answer": [1, 2, 3]})


class TestText:
    def test_exact_match(self):
        assert exact_match(" Paris\n", "Paris") == 1.0
        assert exact_match(" Paris\n", "Paris", strip=False) == 0.0
        assert exact_match("paris", "Paris") == 0.0
        assert exact_match("paris", "Paris", ignore_case=True) == 1.0
        assert exact_match(["Paris", "Rome"], "Paris") == [1.0, 0.0]

    def test_regex_match(self):
        assert regex_match("it is 42", r"\d+") == 1.0
        assert regex_match("it is 42", r"\d+", full=True) == 0.0
        assert regex_match(["42", "x"], re.compile(r"\d+"), full=True) == [1.0, 0.0]

    def test_extract_tag(self):
        assert extract_tag("<answer> a </answer><answer>b\n</answer>", "answer") == "b"
        assert extract_tag(["<answer>a", ""], "answer") == [None, None]

    @pytest.mark.parametrize(
        ("text", "score"),
        [
            ("<think>a\nb</think><answer>4</answer>", 1.0),
            ("  <think></think>\n<answer>4</answer>\n", 1.0),
            ("<answer>4</answer><think>a</think>", 0.0),
            ("<think>a</think>4", 0.0),
            ("so <think>a</think><answer>4</answer>", 0.0),
            ("<think>a</think><answer>4</answer> done", 0.0),
            ("<think>a</think><answer>4", 0.0),
            ("<think><think>a</think></think><answer>4</answer>", 0.0),
            ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ],
    )
    def test_tag_format(self, text, score):
        assert tag_format(text) == score
        assert tag_format([text, text]) == [score, score]

    def test_tag_format_with_other_tags(self):
        assert tag_format("<a>1</a>", tags=("a",)) == 1.0


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("some work 12\n#### 42", 42.0),
            ("#### 1,234", 1234.0),
            ("#### -$1,234.50 in all", -1234.5),
            ("#### 1\nso\n#### 2\nand 3", 2.0),
            ("#### 3/4", 0.75),
            (r"so \boxed{7}, not 8", 7.0),
            (r"\boxed{1} then \boxed{2}", 2.0),
            (r"\boxed{\frac{1}{2}}", 0.5),
            (r"\boxed{-\dfrac{3}{4}}", -0.75),
            (r"$\boxed{\$1{,}234}$", 1234.0),
            (r"\boxed{1\,234}", 1234.0),
            (r"\boxed{42\text{ cm}}", 42.0),
            (r"\boxed{50\%}", 50.0),
            (r"\boxed{x+1}", None),
            (r"\boxed{\frac{1}{0}}", None),
            (r"\boxed{", None),
            ("the answer is 42.", 42.0),
            ("it costs $1,234.50.", 1234.5),
            ("about 50% of 20", 20.0),
            ("1,234,567", 1234567.0),
            ("9 - 5 = 4", 4.0),
            ("from 3-5", 5.0),
            ("x=-7", -7.0),
            ("so \u22123", -3.0),
            (".25", 0.25),
            ("1.5e3", 1500.0),
            ("1e999", None),
            ("(-3)", -3.0),
            ("version v2", None),
            ("none", None),
            ("", None),
        ],
    )
    def test_extract_number(self, text, number):
        assert extract_number(text) == number
        assert extract_number([text, "5"]) == [number, 5.0]

    def test_number_match(self):
        assert number_match("#### 1,234", 1234) == 1.0
        assert number_match("it is 0.3", 0.1 + 0.2) == 1.0
        assert number_match(["4", "5", "none"], "work\n#### 4") == [1.0, 0.0, 0.0]
        assert number_match("3.1", math.pi) == 0.0
        assert number_match("3.1", math.pi, tolerance=0.05) == 1.0
        with pytest.raises(UsageError, match="holds no number"):
            number_match("4", "four")
        with pytest.raises(UsageError, match="answer is nan"):
            number_match("4", math.nan)

    def test_long_texts_are_read_in_linear_time(self):
        start = time.perf_counter()
        for text in ("1," * 50_000, "9" * 3000 + "x", r"\boxed{" * 2000, "-" * 50_000, "<think>" * 5_000):
            extract_number(text)
            tag_format(text)
        assert time.perf_counter() - start < 2.0


class TestMath:
    def test_without_math_verify_the_error_holds_the_install_line(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "math_verify", None)
        with pytest.raises(MissingDependencyError, match="pip install math-verify"):
            math_match("4", "4")

    def test_equal_mathematics_match_in_every_thread(self):
        pytest.importorskip("math_verify")
        group = [r"so \boxed{\frac{2}{4}}", r"\boxed{0.5}", r"\boxed{3}", "nothing"]
        assert math_match(group, r"\frac{1}{2}") == [1.0, 1.0, 0.0, 0.0]
        assert math_match(r"\boxed{x+1}", "1+x") == 1.0
        got = []
        thread = threading.Thread(target=lambda: got.append(math_match(group, r"\frac{1}{2}")))
        thread.start()
        thread.join()
        assert got == [[1.0, 1.0, 0.0, 0.0]]


class TestPrograms:
    def test_a_program_and_its_tests(self):
        result = run_python(
            "def add(a, b): return a + b\nprint(add(1, 2))", tests=["assert add(1, 2) == 3", "assert 0"]
        )
        assert result.passed == (True, False)
        assert (result.error, result.timed_out, result.stdout) == (None, False, "3\n")

    def test_a_program_that_fails_passes_no_test(self):
        result = run_python("x = 1\n1 / 0", tests=["assert x == 1"])
        assert result.passed == (False,)
        assert result.error == "ZeroDivisionError: division by zero"
        assert run_python("def", tests=["pass"]).error.startswith("File") or "SyntaxError" in run_python("def").error

    @pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
    def test_leaving_early_passes_no_test(self, leave):
        assert run_python(leave, tests=["assert False"]).passed == (False,)

    def test_writing_a_report_of_ones_own_passes_no_test(self):
        forge = """
import json, os
for fd in range(3, 20):
    try:
        os.write(fd, json.dumps({"key": "", "error": None, "errors": [None]}).encode())
    except OSError:
        pass
os._exit(0)
"""
        assert run_python(forge, tests=["assert False"]).passed == (False,)

    def test_an_endless_loop_is_killed_in_time(self):
        start = time.perf_counter()
        result = run_python("print('in', flush=True)\nwhile True: pass", tests=["assert True"], timeout=0.5)
        assert time.perf_counter() - start < 2.0
        assert (result.passed, result.timed_out, result.stdout) == ((False,), True, "in\n")
        assert result.error == "no end after 0.5 s"

    def test_children_of_the_program_are_killed_with_it(self, tmp_path):
        code = f"""
import os, time
if os.fork() == 0:
    time.sleep(0.6)
    open({str(tmp_path / "late")!r}, "w").close()
"""
        assert run_python(code, tests=["assert True"], timeout=3).passed == (True,)
        time.sleep(0.9)
        assert not (tmp_path / "late").exists()

    def test_memory_and_files_are_bounded(self):
        result = run_python("x = bytearray(2**29)", tests=["assert True"], memory_mb=256)
        assert (result.passed, result.error) == ((False,), "MemoryError")
        assert run_python("x = bytearray(2**25)", tests=["assert True"], memory_mb=256).passed == (True,)
        result = run_python("open('f', 'wb').write(bytes(2**21))", tests=["assert True"], output_mb=1)
        assert result.passed == (False,)
        assert "File too large" in result.error

    def test_it_runs_in_an_empty_folder_without_our_environment(self, monkeypatch):
        monkeypatch.setenv("SECRET_TOKEN", "s3cret")
        result = run_python("import os; print(os.listdir(), 'SECRET_TOKEN' in os.environ, input())", stdin="hello\n")
        assert result.stdout == "[] False hello\n"

    def test_it_runs_from_any_thread(self):
        got = []
        thread = threading.Thread(target=lambda: got.append(run_python("", tests=["assert 1"]).passed))
        thread.start()
        thread.join()
        assert got == [(True,)]

    def test_no_file_or_process_is_left_behind(self):
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for _ in range(3):
            run_python("while True: pass", timeout=0.1)
        after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        assert after == before

    @pytest.mark.parametrize("limits", [{"timeout": 0}, {"memory_mb": -1}, {"timeout": math.inf}, {"output_mb": True}])
    def test_limits_that_cannot_be_are_refused(self, limits):
        with pytest.raises(UsageError, match="must be a number > 0"):
            run_python("", **limits)

    def test_unit_tests_gives_the_share_that_passes(self):
        good = "Here:\n```python\ndef inc(x):\n    return x + 1\n```\nDone."
        bad = "```python\ndef inc(x):\n    return 2\n```"
        tests = ["assert inc(1) == 2", "assert inc(2) == 3"]
        assert unit_tests(good, tests) == 1.0
        assert unit_tests([good, bad, "no code here"], tests) == [1.0, 0.5, 0.0]
        assert unit_tests(good, tests[0]) == 1.0
        with pytest.raises(UsageError, match="got no tests"):
            unit_tests(good, [])

    def test_extract_code_takes_the_last_python_block(self):
        assert extract_code("```python\na\n```\n```py\nb\n```") == "b\n"
        assert extract_code("```\na\n```") == "a\n"
        assert extract_code("```bash\nls\n```\n```python\na\n```") == "a\n"
        assert extract_code("```python\nunclosed") == "unclosed"
        assert extract_code(["x = 1", "```\ny\n```"]) == ["x = 1", "y\n"]

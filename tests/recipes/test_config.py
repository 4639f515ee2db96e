"""Flags, environment and files become one Config: precedence, spellings, mistakes."""

import dataclasses
import inspect
import math

import pytest

from local_tinker import ServiceClient, TrainingClient
from local_tinker.errors import UsageError
from local_tinker.losses import LOSSES
from local_tinker.recipes import RECIPES, command, find_recipe, sources
from local_tinker.recipes.config import Common, options, resolved
from local_tinker.types import AdamParams

NEEDED = ["--model", "m", "--dataset", "d.jsonl"]


def config(*words, environ=None, needed=True):
    return command.parse([*(NEEDED if needed else []), *words], environ=environ or {}).config


@pytest.fixture
def file(tmp_path):
    def write(text, name="c.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_environment_over_file_over_defaults(file):
    path = file("rank: 4\nalpha: 4\nseed: 4\nmodel: filed\ndataset: d.jsonl\n")
    environ = {"LOCAL_TINKER_RANK": "8", "LOCAL_TINKER_ALPHA": "8"}
    found = config("--config", path, "--rank", "16", environ=environ, needed=False)
    assert (found.rank, found.alpha, found.seed, found.batch_size) == (16, 8.0, 4, 16)
    assert found.model == "filed"


@pytest.mark.parametrize(
    "words, field, value",
    [
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--lr=3e-4"], "learning_rate", 3e-4),
        (["--num_train_epochs", "3"], "epochs", 3),
        (["--lora_r", "8"], "rank", 8),
        (["--lora-alpha", "8"], "alpha", 8.0),
        (["--max_seq_length", "99"], "max_length", 99),
        (["--model_name_or_path", "other"], "model", "other"),
        (["--dataset_name", "rows"], "dataset", "rows"),
        (["--load_in_4bit"], "quantize", "4bit"),
        (["--max-length", "none"], "max_length", None),
        (["--limit", "-1"], "limit", -1),
        (["--no-load-in-8bit"], "quantize", "4bit"),
        (["--warmup_ratio", "0.1"], "warmup", 0.1),
    ],
)
def test_names_of_other_tools_and_both_spellings_are_accepted(words, field, value):
    assert getattr(config(*words), field) == value


def test_yaml_numbers_and_words_mean_what_they_look_like(file):
    path = file(
        "model: no\ndataset: 010\nlearning_rate: 1e-4\nrank: 010\nname: 2026-01-02\nreport_to: off\n"
        "quantize: none\nmax_length: null\nweight_decay: 1.\nseed: +7\n"
    )
    found = config("-c", path, needed=False)
    assert (found.model, found.dataset, found.learning_rate, found.rank) == ("no", "10", 1e-4, 10)
    assert (found.name, found.report_to, found.quantize) == ("2026-01-02", "off", "none")
    assert (found.max_length, found.weight_decay, found.seed) == (None, 1.0, 7)


def test_toml_and_a_table_of_a_pyproject_are_read(file):
    flat = file('model = "m"\ndataset = "d"\nlearning_rate = 1e-3\n', "a.toml")
    table = file('[tool.local-tinker]\nmodel = "m"\ndataset = "d"\nlearning_rate = 1e-3\n', "b.toml")
    assert config("-c", flat, needed=False) == config("-c", table, needed=False)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--learning-rte", "1"], "--learning-rte: unknown option, did you mean --learning-rate?"),
        (["--rank", "0"], "--rank: got '0', a whole number >= 1 is needed"),
        (["--rank", "1.5"], "--rank: got '1.5', a whole number >= 1 is needed"),
        (["--rank", "x"], "a whole number >= 1 is needed"),
        (["--rank"], "--rank needs a value: a whole number >= 1"),
        (["--rank", "--alpha", "2"], "--rank needs a value"),
        (["--alpha", "nan"], "--alpha: got 'nan', a number > 0 is needed"),
        (["--quantize", "4bits"], "one of 4bit, 8bit, none is needed, did you mean 4bit?"),
        (["--eval-fraction", "1"], "a number >= 0 and < 1 is needed"),
        (["rows.jsonl"], "unexpected 'rows.jsonl'"),
        (["--gradient_accumulation_steps", "2"], "batch_size is the effective size"),
        (["--loss", "dop"], "no recipe for loss 'dop', did you mean dpo?"),
        (["--loss"], "--loss needs a value: one of sft, dpo, grpo, ppo"),
        (["--loss", "dpo", "--reference-free", "maybe"], "unexpected 'maybe'"),
        (["--loss", "kto"], "no recipe for loss 'kto': use 'dpo' on pairs"),
        (["--loss", "cross_entropy"], "no recipe for loss 'cross_entropy', which `forward_backward` takes from Python"),
        (["--loss", "SFT"], "no recipe for loss 'SFT', did you mean sft?"),
        (["--beta", "1"], "--beta: an option of loss dpo, grpo, ppo only"),
        (["--num_generations", "8"], "--num_generations: an option of loss grpo only"),
        (["--dryrun"], "--dryrun: unknown option, did you mean --dry-run?"),
        (["--logging-steps", "1"], "every step is in metrics.jsonl"),
        (["grpo"], "unexpected 'grpo': did you mean --loss grpo"),
        ([__file__], f"unexpected {__file__!r}: did you mean --dataset {__file__}?"),
        (["--resume", "x"], "leave --model away"),
    ],
)
def test_mistakes_name_the_flag_what_came_and_what_is_allowed(words, says):
    with pytest.raises(UsageError) as caught:
        config(*words)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("quantizaton: 4bit\n", "c.yaml: quantizaton: unknown option, did you mean quantize?"),
        ("group_size: 8\n", "c.yaml: group_size: an option of loss grpo only"),
        ("resume: true\n", "a run is continued by `run --resume`"),
        ("rank: true\n", "rank: got true, a whole number >= 1 is needed"),
        ("rank: yes\n", "got 'yes', a whole number >= 1 is needed"),
        ("rank: 1\nrank: 2\n", "the key 'rank' stands there twice"),
        ("- rank\n", "holds list"),
        ("", "is empty"),
        ("name: {a: b}\n", "text, or none is needed"),
        ("1: 2\n", "the key 1 is int"),
        ("loss: grpo\nmodel: m\ndataset: arithmetic\n", "is for loss 'grpo' and 'dpo' was asked for"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_config_files_mistakes_are_named(file, text, says):
    with pytest.raises(UsageError) as caught:
        config("-c", file(text), *(["--loss", "dpo"] if "grpo" in text else []))
    assert says in str(caught.value) and "c.yaml" in str(caught.value)


def test_what_is_missing_is_asked_for():
    with pytest.raises(UsageError, match="--model and --dataset are needed"):
        config(needed=False)


def test_the_environment_may_set_other_recipes_but_not_misspell():
    assert config(environ={"LOCAL_TINKER_GROUP_SIZE": "4", "LOCAL_TINKER_CACHE": "/x"}) == config()
    with pytest.raises(UsageError, match="LOCAL_TINKER_RNAK: unknown option, did you mean rank"):
        config(environ={"LOCAL_TINKER_RNAK": "4"})
    chosen = command.parse([*NEEDED], environ={"LOCAL_TINKER_LOSS": "dpo", "LOCAL_TINKER_BETA": "0.3"})
    assert (chosen.loss, chosen.config.beta) == ("dpo", 0.3)


def test_switches_are_turned_on_and_off():
    def free(*words):
        return config("--loss", "dpo", *words).reference_free

    assert [free(), free("--reference-free"), free("--no-reference-free"), free("--reference_free", "no")] == [
        False,
        True,
        False,
        False,
    ]
    assert free("--reference-free=true", "--rank", "2") is True


def test_a_dataset_in_a_file_is_looked_up_beside_it_when_it_is_not_here(file, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    found = config("-c", file("model: m\ndataset: rows.jsonl\neval_dataset: absent.jsonl\n"), needed=False)
    assert found.dataset == str(tmp_path / "rows.jsonl") and found.eval_dataset == "absent.jsonl"


@pytest.mark.parametrize("loss", RECIPES)
def test_the_shipped_recipes_are_read_by_name_from_anywhere(loss, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = command.parse(["--config", f"recipes/{loss}.yaml"], environ={})
    assert (job.loss, job.config.model) == (loss, "smollm2-135m")
    assert command.parse(["-c", loss], environ={}) == job


@pytest.mark.parametrize("loss", RECIPES)
def test_a_resolved_config_reads_back_as_itself(loss, file):
    import yaml

    job = command.parse(["-c", loss, "--warmup", "3"], environ={})
    path = file(yaml.safe_dump(resolved(job.config, loss)))
    assert command.parse(["-c", path], environ={}).config == job.config


def test_defaults_are_those_of_the_clients_signatures():
    signature = inspect.signature(ServiceClient.create_lora_training_client).parameters
    made = config()
    for name, value in made.client().items():
        assert value == signature[name].default, name
    adam = AdamParams()
    assert (made.learning_rate, made.weight_decay, made.grad_clip_norm) == (
        adam.learning_rate,
        adam.weight_decay,
        adam.grad_clip_norm,
    )


@pytest.mark.parametrize("loss, spec", [("dpo", "dpo"), ("grpo", "grpo"), ("ppo", "ppo_rollout")])
def test_a_recipes_loss_options_default_to_those_of_the_loss(loss, spec):
    known = {**LOSSES[spec].defaults, **LOSSES[spec].estimator}
    chosen = find_recipe(loss).Config(model="m", dataset="d").options()
    assert chosen == {name: known[name] for name in chosen}


def test_the_value_heads_learning_rate_defaults_to_that_of_optim_step():
    default = inspect.signature(TrainingClient.optim_step).parameters["value_learning_rate"].default
    assert find_recipe("ppo").Config(model="m", dataset="d").value_learning_rate == default


@pytest.mark.parametrize("loss", RECIPES)
def test_every_field_has_a_help_line_and_no_two_share_a_name(loss):
    known = options(find_recipe(loss).Config)
    spellings = [name for each in known.values() for name in (each.name, *each.aliases)]
    assert all(each.help.endswith(".") for each in known.values())
    assert len(spellings) == len(set(spellings))
    text = command.usage("local-tinker run", loss)
    assert all(each.flag in text for each in known.values()) and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("loss", RECIPES)
def test_a_recipe_is_frozen_flat_and_short(loss):
    module = find_recipe(loss)
    assert issubclass(module.Config, Common) and module.Config.__dataclass_params__.frozen
    assert len(inspect.getsource(module).splitlines()) <= 150
    made = module.Config(model="m", dataset="d")
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in dataclasses.asdict(made).values())


@pytest.mark.parametrize(
    "words, rates",
    [
        ([], [1.0, 1.0, 1.0, 1.0]),
        (["--schedule", "linear"], [1.0, 0.75, 0.5, 0.25]),
        (["--schedule", "linear", "--warmup", "2"], [0.5, 1.0, 1.0, 0.5]),
        (["--schedule", "cosine"], [1.0, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        (["--warmup", "0.5"], [0.5, 1.0, 1.0, 1.0]),
        (["--warmup", "8"], [0.125, 0.25, 0.375, 0.5]),
    ],
)
def test_the_learning_rate_of_every_step(words, rates):
    made = config("--learning-rate", "1.0", *words)
    assert [made.learning_rate_at(step, 4) for step in range(4)] == pytest.approx(rates)


def test_numbers_in_yaml_follow_version_1_2():
    loader_input = "a: 1e-4\nb: -.5\nc: 1_000\nd: 0x10\ne: true\nf: ~\ng: 1:30\n"
    from pathlib import Path

    values = sources._yaml(loader_input, Path("x.yaml"))
    assert values == {"a": 1e-4, "b": -0.5, "c": "1_000", "d": "0x10", "e": True, "f": None, "g": "1:30"}


def test_two_names_of_one_field_with_different_values_are_refused_where_no_order_is_meant(file):
    path = file("rank: 8\nlora_r: 16\n")
    with pytest.raises(UsageError) as caught:
        config("--config", path)
    assert str(caught.value) == f"{path}: lora_r: got 16, and {path}: rank gave 8: both mean rank; leave one away"
    with pytest.raises(UsageError, match="LOCAL_TINKER_RANK: got '8', and LOCAL_TINKER_LORA_R gave '4'"):
        config(environ={"LOCAL_TINKER_RANK": "8", "LOCAL_TINKER_LORA_R": "4"})
    with pytest.raises(UsageError, match="load_in_4bit: got '4bit', and .*quantize gave '8bit': both mean quantize"):
        config("--config", file("quantize: 8bit\nload_in_4bit: true\n"))
    assert config("--config", file("rank: 8\nlora_r: 8\n")).rank == 8
    assert config("--rank", "8", "--lora-r", "16").rank == 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--output-dir", ""], "--output-dir: got '', text is needed; leave it away for the default"),
        (["--name="], "--name: got '', text, or none is needed; leave it away"),
        (["--seed", str(2**63)], "--seed: got '9223372036854775808', a whole number >= 0 and < 9.22337e+18 is needed"),
    ],
)
def test_empty_text_and_a_seed_no_generator_takes_are_refused(words, says):
    with pytest.raises(UsageError) as caught:
        config(*words)
    assert says in str(caught.value)

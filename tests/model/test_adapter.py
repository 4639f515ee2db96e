import pytest
import torch

from local_tinker.errors import CheckpointError, UsageError
from local_tinker.model.adapter import Adapter, AdapterSpec, choose_targets

SHAPES = (("model.layers.0.q_proj", (6, 4)), ("model.layers.0.down_proj", (4, 10)))


def adapter(dtype=torch.bfloat16, **changes):
    spec = AdapterSpec(**{"rank": 2, "alpha": 32, "shapes": SHAPES, "seed": 1, **changes})
    made = Adapter(spec, dtype=dtype, device="cpu")
    made.initialise()
    return made


def test_masters_are_fp32_and_the_compute_copy_follows_them():
    made = adapter()
    assert made.master.dtype == torch.float32 and made.compute.dtype == torch.bfloat16
    made.master += 0.25
    assert not torch.equal(made.compute, made.master.bfloat16())
    made.refresh()
    assert torch.equal(made.compute, made.master.bfloat16())


def test_an_fp64_model_has_fp64_masters_in_one_buffer():
    made = adapter(torch.float64)
    assert made.master.dtype == torch.float64 and made.compute is made.master


def test_b_starts_at_zero_and_a_is_uniform_within_the_kaiming_bound():
    made = adapter(rank=64)
    for (a, b), (_, (_, inputs)) in zip(made.views(made.master).values(), SHAPES, strict=True):
        assert torch.count_nonzero(b) == 0
        bound = inputs**-0.5
        assert float(a.abs().max()) <= bound and float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.2)


def test_the_same_seed_gives_the_same_adapter_whatever_the_global_seed():
    torch.manual_seed(0)
    first = adapter()
    torch.manual_seed(1)
    assert torch.equal(first.master, adapter().master)
    assert not torch.equal(first.master, adapter(seed=2).master)


def test_names_are_those_of_a_peft_file():
    names = adapter().named(torch.zeros(adapter().spec.numel))
    assert {name: tuple(t.shape) for name, t in names.items()} == {
        "base_model.model.model.layers.0.q_proj.lora_A.weight": (2, 4),
        "base_model.model.model.layers.0.q_proj.lora_B.weight": (6, 2),
        "base_model.model.model.layers.0.down_proj.lora_A.weight": (2, 10),
        "base_model.model.model.layers.0.down_proj.lora_B.weight": (4, 2),
    }


def test_views_cover_the_buffer_once():
    made = adapter()
    flat = torch.zeros(made.spec.numel)
    for pair in made.views(flat).values():
        for view in pair:
            view += 1
    assert torch.equal(flat, torch.ones_like(flat))


def test_loading_refuses_missing_extra_and_misshapen_tensors_and_changes_nothing():
    made = adapter()
    before = made.master.clone()
    tensors = {name: torch.ones_like(t) for name, t in made.named(made.master).items()}
    name = next(iter(tensors))
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, "1 tensors missing"),
        ({**tensors, "other": torch.zeros(1)}, "1 tensors not expected"),
        ({**tensors, name: torch.zeros(3, 3)}, r"has shape \(3, 3\), this adapter's is \(2, 4\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            made.load(made.master, broken, what="adapter")
        assert torch.equal(made.master, before)
    made.load(made.master, tensors, what="adapter")
    assert torch.equal(made.master, torch.ones_like(before))


def test_targets_by_suffix_by_path_and_all():
    paths = ["a.0.q_proj", "a.0.k_proj", "a.1.q_proj"]
    assert choose_targets(paths, "all-linear") == tuple(paths)
    assert choose_targets(paths, ["q_proj"]) == ("a.0.q_proj", "a.1.q_proj")
    assert choose_targets(paths, ["a.1.q_proj", "k_proj"]) == ("a.0.k_proj", "a.1.q_proj")


def test_a_target_that_matches_nothing_lists_what_there_is():
    with pytest.raises(
        UsageError, match="'q_prj' matches nothing in this model; did you mean 'q_proj'. It has: k_proj, q_proj"
    ):
        choose_targets(["a.q_proj", "a.k_proj"], ["q_prj"])

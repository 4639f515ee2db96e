import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from local_tinker.errors import UsageError
from local_tinker.model.linear import ONEDNN_ROWS, FrozenLinear, bitsandbytes, project


def frozen(quantize, *, dtype=torch.float32, shape=(96, 128), bias=True):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).to(dtype) * 0.05
    vector = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    return FrozenLinear(weight, vector, quantize=quantize, dtype=dtype, path="layer"), weight


# NF4's values, Dettmers et al. 2023, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_rounds_each_weight_to_the_nearest_level_of_its_block():
    linear, weight = frozen("4bit")
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = levels[(blocks / absmax)[..., None].sub(levels).abs().argmin(-1)] * absmax
    # The absmax itself is quantised to 8 bits, so levels agree to its rounding.
    assert torch.allclose(linear.dense().reshape(-1, 64), nearest, rtol=0, atol=float(absmax.max()) * 0.02)
    assert (linear.dense() - weight).abs().mean() < 0.1 * weight.abs().mean()


def test_nf4_takes_about_four_and_an_eighth_bits_a_weight():
    linear, weight = frozen("4bit", shape=(512, 512))
    assert linear.nbytes() * 8 / weight.numel() == pytest.approx(4.13, abs=0.02)


def test_int8_is_one_absmax_a_row():
    linear, weight = frozen("8bit")
    absmax = weight.half().float().abs().amax(1, keepdim=True)
    expected = torch.round(weight.half().float() / absmax * 127) * absmax / 127
    assert torch.allclose(linear.dense(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8_is_written_in_place_with_the_same_bits(dtype):
    store = frozen("8bit")[0].store
    out = torch.full((store.stored.shape[0], store.stored.shape[1] + 3), 7.0, dtype=dtype)
    store.dense_into(out[:, :-3])
    assert torch.equal(out[:, :-3], store.dense(dtype)) and bool((out[:, -3:] == 7.0).all())


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_a_resident_copy_holds_the_same_bits(quantize):
    linear, _ = frozen(quantize, dtype=torch.bfloat16)
    before = linear.dense()
    linear.hold()
    assert torch.equal(linear.dense(), before)
    linear.release()
    assert torch.equal(linear.dense(), before) and not linear.held


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_forward_and_input_gradient_are_those_of_the_dense_weight(quantize):
    linear, _ = frozen(quantize)
    x = torch.randn(5, 128, requires_grad=True)
    y = linear(x)
    reference = nn.functional.linear(x, linear.dense(), linear.bias)
    assert torch.equal(y, reference)
    direction = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, direction)
    assert torch.allclose(ours, direction @ linear.dense(), atol=1e-6)


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_forwards_without_gradient_in_eval_mode_never_change_the_stored_weight(quantize):
    linear, _ = frozen(quantize, dtype=torch.bfloat16, shape=(128, 256))
    digest, dense = linear.digest(), linear.dense()
    linear.eval()
    with torch.no_grad():
        for rows in (1, 3, 64):
            linear(torch.randn(rows, 256).bfloat16())
    assert linear.digest() == digest
    assert torch.equal(linear.dense(), dense)


def test_int8_rows_do_not_depend_on_their_neighbours():
    linear, _ = frozen("8bit")
    x = torch.randn(8, 128)
    x[3] *= 50  # an outlier row changes LLM.int8's answer for the others
    alone = linear(x[:1])
    assert torch.allclose(linear(x)[:1], alone, atol=1e-5)


def test_an_unknown_quantiser_is_named():
    with pytest.raises(UsageError, match="quantize='5bit' is not known; use one of '4bit', '8bit' or None"):
        FrozenLinear(torch.zeros(4, 64), None, quantize="5bit", dtype=torch.float32, path="p")


def test_importing_bitsandbytes_looks_for_no_kernels_on_a_hub():
    code = (
        "import sys, types\n"
        "fake = types.ModuleType('kernels')\n"
        "def get_kernel(*a, **k): raise SystemExit('asked a hub for kernels')\n"
        "fake.get_kernel = get_kernel\n"
        "sys.modules['kernels'] = fake\n"
        "from local_tinker.model.linear import bitsandbytes\n"
        "bitsandbytes()\n"
        "assert sys.modules['kernels'] is fake\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stderr


def test_bitsandbytes_is_imported_once():
    assert bitsandbytes() is bitsandbytes()


def onednn_calls(monkeypatch):
    """Count what goes to oneDNN."""
    calls, inner = [], torch.ops.mkldnn._linear_pointwise

    def counting(x, *rest):
        calls.append(x.shape[0])
        return inner(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counting)
    return calls


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_few_rows_on_a_cpu_go_to_onednn_and_all_others_to_torch(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    wide, bias = torch.randn(40, 80, generator=generator), torch.randn(40, generator=generator)
    weight, part = wide[:, :64].contiguous(), wide[:, :64]
    calls, rows = onednn_calls(monkeypatch), torch.randn(ONEDNN_ROWS + 1, 64, generator=generator)
    expected = rows.double() @ weight.double().t() + bias.double()
    for count in (0, 1, 3, ONEDNN_ROWS, ONEDNN_ROWS + 1):
        for w in (weight, part):
            with torch.no_grad():
                torch.testing.assert_close(
                    project(rows[:count], w, bias).double(), expected[:count], rtol=1e-5, atol=1e-5
                )
                torch.testing.assert_close(
                    project(rows[:count], w).double(), expected[:count] - bias.double(), rtol=1e-5, atol=1e-5
                )
    assert calls == [1, 1, 3, 3, ONEDNN_ROWS, ONEDNN_ROWS]  # weights that are part of something wider are not in there
    asking = rows[:2].clone().requires_grad_(True)
    project(asking, weight).sum().backward()
    torch.testing.assert_close(asking.grad, weight.sum(0).expand(2, 64))
    half = project(rows[:2].bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16 and len(calls) == 6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_every_product_of_a_decoding_step_on_a_cpu_goes_to_onednn(tiny_model, service, monkeypatch, quantize):
    trainer = service.create_lora_training_client(str(tiny_model), rank=4, quantize=quantize, dtype="float32")
    sampler = trainer.save_weights_and_get_sampling_client()
    sampler.sample("warm", max_tokens=2)
    calls = onednn_calls(monkeypatch)
    steps = len(sampler.sample("one two", max_tokens=6, stop=[]).tokens) - 1
    layers = json.loads((tiny_model / "config.json").read_text())["num_hidden_layers"]
    assert calls.count(1) >= steps * (4 * layers + 1)  # four groups a layer and the head

import pytest
import torch
from torch import nn

from local_tinker.errors import ModelError
from local_tinker.model import attention
from local_tinker.model.attention import (
    VarlenCausal,
    attend_document,
    attend_reference,
    attention_kernel,
    no_mask,
    transformers_attention,
)

EDGES = [0, 1, 8, 21]


def qkv(count: int, *, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, heads, 8, generator=generator, dtype=dtype) for heads in (4, 2, 2))


def by_hand(q, k, v, edges, scale, window, softcap):
    """One query, one head, one key at a time."""
    out = torch.zeros_like(q)
    for start, stop in zip(edges, edges[1:], strict=False):
        for i in range(start, stop):
            for head in range(q.shape[1]):
                seen = range(start if window is None else max(start, i - window + 1), i + 1)
                scores = torch.stack([q[i, head] @ k[j, head // 2] * scale for j in seen])
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[i, head] = scores.softmax(0) @ torch.stack([v[j, head // 2] for j in seen])
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_packed_documents_attend_causally_to_themselves(window, softcap):
    q, k, v = qkv(21)
    expected = by_hand(q, k, v, EDGES, 0.3, window, softcap)
    ours = VarlenCausal(EDGES, "cpu")(0, q, k, v, scale=0.3, window=window, softcap=softcap)
    reference = attend_reference(q, k, v, EDGES, scale=0.3, window=window, softcap=softcap)
    torch.testing.assert_close(reference, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.7), (4, 0.7)])
def test_gradients_equal_the_reference(window, softcap):
    ours, theirs = (tuple(t.requires_grad_() for t in qkv(21)) for _ in range(2))
    options = dict(scale=0.3, window=window, softcap=softcap)
    VarlenCausal(EDGES, "cpu")(0, *ours, **options).sin().sum().backward()
    attend_reference(*theirs, EDGES, **options).sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.7), (4, 0.7)])
def test_documents_that_go_on_from_a_prefix_equal_whole_ones_and_so_do_gradients(window, softcap):
    edges, prefixes = [0, 4, 9, 16, 17, 21], [None, None, 1, 1, None]
    rows = [*range(9), *range(4, 9), *range(9, 16), *range(4, 9), 16, *range(17, 21)]
    own = [*range(9), *range(14, 21), 26, *range(27, 31)]
    ours, theirs = (tuple(t.requires_grad_() for t in qkv(21)) for _ in range(2))
    options = dict(scale=0.3, window=window, softcap=softcap)
    out = VarlenCausal(edges, "cpu", prefixes=prefixes)(0, *ours, **options)
    expected = attend_reference(*(t[rows] for t in theirs), [0, 4, 9, 21, 27, 31], **options)[own]
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_documents_that_go_on_stand_right_behind_their_prefix():
    with pytest.raises(AssertionError, match="stand behind it"):
        VarlenCausal([0, 4, 9, 12], "cpu", prefixes=[None, None, 0])


@pytest.mark.parametrize("window", [None, 5])
def test_capped_attention_in_blocks_equals_one_block(window, monkeypatch):
    monkeypatch.setattr("local_tinker.model.attention.QUERY_BLOCK", 4)
    ours, theirs = (tuple(t.requires_grad_() for t in qkv(13)) for _ in range(2))
    out = attend_document(*ours, scale=0.3, window=window, softcap=0.7)
    expected = attend_reference(*theirs, [0, 13], scale=0.3, window=window, softcap=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.7), (4, 0.7)])
@pytest.mark.parametrize("asked", [1, 3])
def test_the_last_positions_of_a_document_see_all_before_them(asked, window, softcap):
    q, k, v = qkv(11)
    options = dict(scale=0.3, window=window, softcap=softcap)
    whole = attend_reference(q, k, v, [0, 11], **options)
    torch.testing.assert_close(attend_document(q[-asked:], k, v, **options), whole[-asked:], rtol=1e-12, atol=1e-12)


def test_transformers_modules_attend_row_by_row_with_a_cache_and_without():
    q, k, v = qkv(11)
    module = nn.Module()
    whole = attend_reference(q, k, v, [0, 11], scale=8**-0.5, window=4)
    for asked in (11, 2):
        rows = [t.transpose(0, 1)[None].repeat(2, 1, 1, 1) for t in (q[-asked:], k, v)]
        out, weights = transformers_attention(module, *rows, None, sliding_window=4)
        assert weights is None and out.shape == (2, asked, 4, 8)
        for row in out:
            torch.testing.assert_close(row, whole[-asked:], rtol=1e-12, atol=1e-12)


def test_transformers_modules_hand_a_pack_to_attend():
    q, k, v = qkv(21)
    module = nn.Module()
    module.layer_idx = 5
    seen = []

    def attend(layer, q, k, v, **options):
        seen.append((layer, options))
        return VarlenCausal(EDGES, "cpu")(layer, q, k, v, **options)

    rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out, _ = transformers_attention(module, *rows, None, scaling=0.3, softcap=0.7, attend=attend)
    assert seen == [(5, dict(scale=0.3, window=None, softcap=0.7))]
    torch.testing.assert_close(out[0], attend_reference(q, k, v, EDGES, scale=0.3, softcap=0.7), rtol=1e-12, atol=1e-12)
    with pytest.raises(ModelError, match="2 rows"):
        transformers_attention(module, *(t.repeat(2, 1, 1, 1) for t in rows), None, attend=attend)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(s_aux=torch.zeros(4)), "sinks"),
        (dict(dropout=0.1), "dropout"),
        (dict(attention_mask=torch.zeros(1, 1, 3, 3)), "a mask"),
        (dict(is_causal=False), "bidirectional"),
    ],
)
def test_what_attention_does_not_do_is_refused_by_name(options, said):
    rows = [t.transpose(0, 1)[None] for t in qkv(3)]
    with pytest.raises(ModelError, match=said):
        transformers_attention(nn.Module(), *rows, **options)


def test_padding_is_refused_where_the_mask_would_be_built():
    assert no_mask(batch_size=1, attention_mask=None) is None
    with pytest.raises(ModelError, match="padded"):
        no_mask(batch_size=1, attention_mask=torch.ones(1, 3))


def test_the_kernel_in_use_has_a_name(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    named = [(cuda, torch.bfloat16, 128, None), (cuda, torch.bfloat16, 128, 50.0), (cuda, torch.bfloat16, 20, None)]
    named += [(cuda, torch.bfloat16, 512, None), (cuda, torch.float32, 128, None), (cpu, torch.bfloat16, 128, None)]
    monkeypatch.setattr(attention, "triton_ready", lambda kind: kind == "cuda")
    assert [attention_kernel(*case) for case in named] == ["packed"] * 3 + ["sdpa per document"] * 3
    monkeypatch.setattr(attention, "triton_ready", lambda kind: False)
    fallen = ["flash", "capped softmax per document"] + ["sdpa per document"] * 4
    assert [attention_kernel(*case) for case in named] == fallen


def test_documents_must_be_non_empty_and_in_order():
    for edges in ([0], [1, 4], [0, 3, 3], [0, 5, 2]):
        with pytest.raises(AssertionError):
            VarlenCausal(edges, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_kernels_equal_the_reference_forward_and_backward(dtype, window):
    edges, generator = [0, 1, 300, 812], torch.Generator().manual_seed(0)
    drawn = [torch.randn(812, heads, 64, generator=generator) for heads in (8, 2, 2)]
    ours = [t.to("cuda", dtype).requires_grad_() for t in drawn]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out = VarlenCausal(edges, "cuda")(0, *ours, scale=0.1, window=window, softcap=None)
    expected = attend_reference(*theirs, edges, scale=0.1, window=window)
    dy = torch.randn(812, 8, 64, generator=generator).to("cuda")
    out.backward(dy.to(dtype))
    expected.backward(dy.to(dtype).double())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip([out, *(t.grad for t in ours)], [expected, *(t.grad for t in theirs)], strict=True):
        assert ((a.double() - b).norm() / b.norm().clamp_min(100.0)).item() < tolerance  # with one key dq and dk are 0


@pytest.mark.parametrize("window", [None, 3])
def test_documents_of_one_length_take_one_call_and_equal_one_by_one(window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(21, h, 8, generator=generator).double() for h in (4, 2, 2))
    alone = [
        attention.attend_document(q[i : i + 7], k[i : i + 7], v[i : i + 7], scale=0.3, window=window)
        for i in (0, 7, 14)
    ]
    calls, real = [], attention.attend_equal
    monkeypatch.setattr(attention, "attend_equal", lambda *a, **o: calls.append(1) or real(*a, **o))
    out = attention.VarlenCausal([0, 7, 14, 21], "cpu")(0, q, k, v, scale=0.3, window=window, softcap=None)
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-12, rtol=0)
    assert calls == [1]
    attention.VarlenCausal([0, 7, 15, 21], "cpu")(0, q, k, v, scale=0.3, window=window, softcap=None)
    assert calls == [1]

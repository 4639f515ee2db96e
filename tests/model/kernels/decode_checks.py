"""Decoding kernels against their torch references: run on a card by tests/gpu, and in Triton's interpreter on a CPU by
test_interpreted.py."""

import pytest
import torch

from local_tinker.model.kernels import triton_ready
from local_tinker.model.kernels.decode_attention import decode_attention, decode_attention_reference
from local_tinker.model.kernels.decode_begin import (
    embed_norm,
    embed_norm_reference,
    turn_angles,
    turn_angles_reference,
)
from local_tinker.model.kernels.decode_step import (
    HeadNorms,
    add_norm,
    add_norm_reference,
    gated_product,
    gated_reference,
    rope_write,
    rope_write_reference,
)
from local_tinker.model.kernels.draw import Noise, Output, RowState, advance, draw, draw_reference
from local_tinker.model.kernels.low_rank import LowRank, add_low_rank, join_slices, join_slices_reference
from local_tinker.model.kernels.paged import PagedRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
# bf16: two units in the last place of the largest values, after a chain of roundings
CLOSE = {torch.float32: dict(atol=2e-5, rtol=2e-5), torch.bfloat16: dict(atol=6e-2, rtol=2e-2)}

SIZES = [(3, 1, 64), (4, 4, 32), (7, 1, 128), (8, 2, 80), (2, 1, 256)]
LIMITS = [(None, None), (70, None), (None, 3.0), (5, 2.0)]
# The interpreter takes seconds for each, a card none: there every size meets every limit.
ATTENTION = (
    [(*size, *limit, fixed) for size in SIZES for limit in LIMITS for fixed in (False, True)]
    if DEVICE == "cuda"
    else [(*size, *LIMITS[i % 4], i == 4) for i, size in enumerate(SIZES)]
)

pytestmark = pytest.mark.skipif(not triton_ready(DEVICE), reason="Triton runs neither on a card nor interpreted here")


def normal(*shape, seed=0, dtype=torch.float32, gain=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * gain
    return values.to(DEVICE, dtype)


def whole(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _cut(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def paged(own, prefix_of, prefixes, readers, *, own_split=64, prefix_split=64, fixed=False):
    """Rows with `own` tokens each, `prefix_of` a prefix or -1, prefixes of so many tokens; pages handed out shuffled."""
    counts = [-(-n // PAGE) for n in (*own, *prefixes)]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)) + 1
    taken = list(order.split(counts))

    def table(rows):
        out = torch.zeros(len(rows), max(len(r) for r in rows), dtype=torch.int32)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out.to(DEVICE)

    lists = [[row for row, p in enumerate(prefix_of) if p == i] for i in range(len(prefixes))]
    segments = [(i, part) for i, rows in enumerate(lists) for part in _cut(rows, readers)]
    return sum(counts) + 1, PagedRows(
        own_pages=table(taken[: len(own)]),
        own_length=whole(own),
        prefix_length=whole([0 if p < 0 else prefixes[p] for p in prefix_of]),
        prefix_pages=table([taken[len(own) + i] for i, _ in segments]) if segments else None,
        readers=whole([[*part, *[-1] * (readers - len(part))] for _, part in segments]) if segments else None,
        own_split=own_split,
        prefix_split=prefix_split,
        own_most=max(own) + 70,
        prefix_most=max(prefixes, default=1),
        fixed=fixed,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "width", "window", "softcap", "fixed"), ATTENTION)
def test_attention_over_pages_equals_its_reference(dtype, heads, shared, width, window, softcap, fixed):
    pages, rows = paged([1, 64, 65, 190, 7], [0, -1, 0, 1, 0], [130, 64], 2, fixed=fixed)
    keys, values = (normal(pages, shared, PAGE, width, seed=s, dtype=dtype) for s in (1, 2))
    q = normal(5, heads, width, seed=3, dtype=dtype)
    given = dict(scale=width**-0.5, window=window, softcap=softcap)
    expected = decode_attention_reference(q, keys, values, rows, **given)
    torch.testing.assert_close(decode_attention(q, keys, values, rows, **given), expected, **CLOSE[dtype])


@pytest.mark.parametrize(
    ("longest", "own_split"), [(100, 256), (100, 128), (700, 64)]
)  # one split, two, and more than a program takes several heads of
def test_attention_without_any_shared_prompt_equals_its_reference(longest, own_split):
    pages, rows = paged([3, longest], [-1, -1], [], 1, own_split=own_split)
    keys, values = (normal(pages, 2, PAGE, 16, seed=s) for s in (1, 2))
    q = normal(2, 4, 16, seed=3)
    expected = decode_attention_reference(q, keys, values, rows, scale=0.3)
    torch.testing.assert_close(decode_attention(q, keys, values, rows, scale=0.3), expected, **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), LIMITS)
def test_rows_that_are_read_whole_equal_their_reference(dtype, window, softcap):
    pages, rows = paged([1, 64, 65, 130], [-1] * 4, [], 1, own_split=256)
    assert rows.own_splits == 1
    keys, values = (normal(pages, 2, PAGE, 32, seed=s, dtype=dtype) for s in (1, 2))
    q = normal(4, 6, 32, seed=3, dtype=dtype)
    given = dict(scale=0.2, window=window, softcap=softcap)
    expected = decode_attention_reference(q, keys, values, rows, **given)
    torch.testing.assert_close(decode_attention(q, keys, values, rows, **given), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("factor", "weighted", "kind"),
    [
        (None, True, "round_then_scale"),
        (10.5, True, "one_plus"),
        (10.5, True, "scale_then_round"),
        (0.0, False, "one_plus"),
    ],
)
def test_embedding_and_norm_equal_their_reference(dtype, factor, weighted, kind):
    tokens = torch.tensor([3, 0, 49, 3], device=DEVICE)
    embedding = normal(50, 100, seed=1, dtype=dtype)
    given = dict(eps=1e-5, kind=kind)
    weight = normal(100, seed=2, dtype=dtype) if weighted else None
    expected = embed_norm_reference(tokens, embedding, factor, weight, **given)
    for mine, theirs in zip(embed_norm(tokens, embedding, factor, weight, **given), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_equal_their_reference_up_to_the_longest_contexts(dtype):
    positions = torch.tensor([0, 1, 5, 4095, 131071, 1048575], device=DEVICE)
    inv_freq = 5e5 ** (-torch.arange(0, 80, 2, device=DEVICE).float() / 80)
    for mine, theirs in zip(
        turn_angles(positions, inv_freq, 1.25, dtype),
        turn_angles_reference(positions, inv_freq, 1.25, dtype),
        strict=True,
    ):
        # one unit in the last place of numbers above 1: both are rounded from the same fp32 product
        torch.testing.assert_close(mine, theirs, atol=2**-23 if dtype == torch.float32 else 2**-7, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["round_then_scale", "scale_then_round", "one_plus"])
@pytest.mark.parametrize(("after", "before"), [(False, True), (True, True), (True, False)])
def test_residual_and_norm_equal_their_reference(dtype, kind, after, before):
    wide = normal(5, 110, seed=1, dtype=dtype)
    x, residual = wide[:, :100], normal(5, 100, seed=2, dtype=dtype)
    weights = [normal(100, seed=s, dtype=dtype) if on else None for s, on in ((3, after), (4, before))]
    theirs, mine = residual.clone(), residual.clone()
    expected = add_norm_reference(x, theirs, *weights, eps=1e-5, kind=kind)
    out = add_norm(x, mine, *weights, eps=1e-5, kind=kind)
    torch.testing.assert_close(mine, theirs, **CLOSE[dtype])
    torch.testing.assert_close(out, expected, **CLOSE[dtype])


def low_rank(rows, edges, *, rank=16, dtype=torch.float32):
    thin = normal(rows, (len(edges) - 1) * rank + 8, seed=8, dtype=dtype)
    return LowRank(thin[:, 8:], normal(edges[-1], rank, seed=9, dtype=dtype, gain=0.2), 0.5, edges)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "round_then_scale", "one_plus"])
@pytest.mark.parametrize(("adapter", "rotate", "wide"), [(0, True, False), (3, True, True), (1, False, False)])
def test_rotation_and_cache_write_equal_their_reference(dtype, norm, adapter, rotate, wide):
    heads, shared, width, count = 3, 2, 32, 19
    outputs = (heads + 2 * shared) * width
    pages, rows = paged([1 + 7 * i for i in range(count)], [-1] * count, [], 1)
    y = normal(count, outputs + 16, seed=1, dtype=dtype)
    edges = (0, heads * width, (heads + shared) * width, outputs) if adapter == 3 else (0, outputs)
    turns = normal(count, width // 2, seed=2, gain=3.0)
    angles = tuple(t.to(torch.float32 if wide else dtype) for t in (turns.cos(), turns.sin())) if rotate else None
    given = dict(
        heads=heads,
        low_rank=low_rank(count, edges, dtype=dtype) if adapter else None,
        norms=HeadNorms(normal(width, seed=5, dtype=dtype), normal(width, seed=6, dtype=dtype), 1e-6, norm)
        if norm
        else None,
    )
    results = []
    for function in (rope_write_reference, rope_write):
        keys, values = (torch.zeros(pages, shared, PAGE, width, dtype=dtype, device=DEVICE) for _ in range(2))
        q = function(y.clone(), angles, keys, values, rows, **given)
        results.append((q, keys, values))
    for mine, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, theirs.contiguous(), **CLOSE[dtype])
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("parts", "count"), [(0, 18), (1, 18), (2, 18), (2, 70)])
def test_the_gated_product_equals_its_reference(dtype, activation, parts, count):
    size = 150
    y = normal(count, 2 * size + 32, seed=1, dtype=dtype, gain=2.0)
    edges = (0, size, 2 * size) if parts == 2 else (0, 2 * size)
    adapter = low_rank(count, edges, dtype=dtype) if parts else None
    expected = gated_reference(y.clone(), size, activation, low_rank=adapter)
    torch.testing.assert_close(gated_product(y, size, activation, low_rank=adapter), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_added_in_place_equals_its_reference(dtype):
    y = normal(70, 216, seed=1, dtype=dtype)
    adapter = low_rank(70, (0, 200), dtype=dtype)
    expected = adapter.add_to(y.clone()[:, :200])
    torch.testing.assert_close(add_low_rank(y[:, :200], adapter), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slices", "rows"), [(2, 3), (4, 70)])
def test_slices_of_a_product_are_joined_as_in_their_reference(dtype, slices, rows):
    parts = normal(slices, rows, 230, seed=1)
    up = normal(200, 16, seed=2, dtype=dtype)
    expected = join_slices_reference(parts, 200, up, 0.5, dtype)
    torch.testing.assert_close(join_slices(parts, 200, up, 0.5, dtype), expected, **CLOSE[dtype])


def noise(count, *, temperature=1.0):
    seeds = torch.arange(count, device=DEVICE) * 2**35 + 11
    numbers = torch.arange(count, dtype=torch.int32, device=DEVICE) % 7
    return Noise(seeds, numbers, torch.full((count,), temperature, device=DEVICE))


@pytest.mark.parametrize("vocab", [700, 5000])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_draws_equal_their_reference_token_for_token(vocab, temperature, filtered):
    logits = normal(24, vocab, seed=4, gain=2.5)
    kept = logits.masked_fill(logits < logits.topk(9).values[:, -1:], -torch.inf) if filtered else None
    expected, truth = draw_reference(logits, noise(24, temperature=temperature), kept=kept)
    token, logprob = draw(logits, noise(24, temperature=temperature), kept=kept)
    assert token.tolist() == expected.tolist()
    torch.testing.assert_close(logprob, truth, atol=1e-5, rtol=1e-5)
    if temperature:
        assert len(set(token.tolist())) > 5


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((64, 3000), -torch.inf, device=DEVICE)
    logits[:, 2500], logits[:, 2999] = 0.3, 0.1
    token, logprob = draw(logits, noise(64))
    assert set(token.tolist()) == {2500, 2999}
    assert torch.isfinite(logprob).all()


def some_state(count):
    generator = torch.Generator().manual_seed(5)
    whole64 = {name: torch.arange(count) + i for i, name in enumerate(("token", "position", "seed", "top_k"))}
    short = {
        "own_length": torch.arange(count) % 3,
        "prefix_length": torch.arange(count),
        "number": torch.arange(count) * 2,
        "left": torch.arange(count) % 3 + 1,
        "alive": (torch.rand(count, generator=generator) < 0.7).int(),
    }
    real = {name: torch.ones(count) for name in ("temperature", "top_p", "min_p")}
    stops = torch.full((count, 8), -1).int()
    stops[:, 2] = 105
    return RowState(
        **{k: v.to(DEVICE) for k, v in whole64.items()},
        **{k: v.to(DEVICE, torch.int32) for k, v in short.items()},
        **{k: v.to(DEVICE) for k, v in real.items()},
        stops=stops.to(DEVICE),
    )


def test_moving_the_rows_on_equals_its_reference(monkeypatch):
    count = 21
    token = torch.arange(100, 100 + count, device=DEVICE)
    logprob = normal(count, seed=3)
    results = []
    for ready in (True, False):
        if not ready:
            monkeypatch.setattr("local_tinker.model.kernels.draw.triton_ready", lambda device: False)
        state = some_state(count)
        out = Output(
            torch.zeros(2, count + 3, dtype=torch.int32, device=DEVICE),
            torch.zeros(2, count + 3, device=DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
        )
        for _ in range(2):
            advance(state, token, logprob, out)
        results.append([*vars(state).values(), out.tokens, out.logprobs, out.at])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert 0 < int(results[0][6].sum()) < count

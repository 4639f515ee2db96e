import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from local_tinker.model.kernels.decode_attention import decode_attention
from local_tinker.model.kernels.decode_step import rope_write_reference
from local_tinker.model.kernels.paged import PagedRows
from local_tinker.sampler.group import PAGE, Group
from local_tinker.sampler.grouping import build_groups
from local_tinker.sampler.kv_cache import DecodeAttend, KVCache, PromptAttend, places
from local_tinker.sampler.scheduler import Piece
from local_tinker.sampler.sequence import Request, SamplingParams
from tests.sampler.toy import plain_causal

HEADS, SHARED, WIDTH, SCALE = 4, 2, 8, 0.3


def new_cache(pages, dtype=torch.float64):
    cache = KVCache(layers=1, kv_heads=SHARED, head_dim=WIDTH, dtype=dtype, device="cpu")
    cache.grow(pages)
    return cache


def qkv(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, h, WIDTH, generator=generator).double() for h in (HEADS, SHARED, SHARED))


def put(cache, pages, k, v):
    page, place = map(torch.from_numpy, places(pages, 0, len(k)))
    cache.keys[0][page, :, place], cache.values[0][page, :, place] = k, v


def test_storage_grows_and_keeps_what_it_holds():
    cache = new_cache(2)
    cache.keys[0][:] = 3.0
    assert not cache.grow(2)
    assert cache.grow(3) and cache.pages == 3
    assert cache.keys[0][:2].eq(3).all() and cache.keys[0][2:].eq(0).all()
    assert cache.grow(4) and cache.pages == 4
    assert cache.nbytes == 2 * 4 * SHARED * PAGE * WIDTH * 8
    assert cache.grow(9, keep=False) and cache.keys[0].eq(0).all()
    cache.free()
    assert cache.nbytes == 0 and cache.grow(1)


@pytest.mark.parametrize("window", [None, 1, 7, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [3, 70, 200])
def test_a_context_in_pieces_attends_as_one_whole(window, softcap, chunk):
    length = 100
    q, k, v = qkv(length, seed=1)
    cache = new_cache(4)
    group = Group(tuple(range(length)), shared=True, pages=[3, 1])
    parts = []
    for start in range(0, length, chunk):
        stop = min(length, start + chunk)
        attend = PromptAttend(cache, [Piece(group, start, stop)])
        cut = slice(start, stop)
        parts.append(attend(0, q[cut], k[cut], v[cut], scale=SCALE, window=window, softcap=softcap))
    expected = plain_causal(0, q, k, v, scale=SCALE, window=window, softcap=softcap)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-12, rtol=0)


class Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_layers_storage_is_not_turned_over_to_be_written():
    """index_put_ with indices on both sides of a slice copies the whole tensor where it must be deterministic on a card."""
    cache, group = new_cache(4), Group(tuple(range(100)), shared=True, pages=[3, 1])
    q, k, v = qkv(30, seed=1)
    with Calls() as calls:
        attend = PromptAttend(cache, [Piece(group, 70, 100)])
        attend(0, q, k, v, scale=SCALE, window=None, softcap=None)
        rows = PagedRows(
            torch.tensor([[2]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32),
            torch.tensor([0], dtype=torch.int32), None, None, 64, 64, 64, 64,
        )  # fmt: skip
        DecodeAttend(cache, rows)(0, q[:1], k[:1], v[:1], scale=SCALE, window=None, softcap=None)
    assert not calls.names & {"index", "index_put", "index_put_"} and "index_copy_" in calls.names
    assert torch.equal(cache.keys[0][1, :, 6:36], k.transpose(0, 1)) and torch.equal(cache.values[0][2, :, 4], v[0])


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_computed_again_sees_the_shared_prompt_and_pieces_beside_it_do_not(window):
    asked = Request(tuple(range(70)), SamplingParams(max_tokens=90), seed=0, n=2)
    (group,) = build_groups(
        [asked], max_positions=500, vocab_size=500, tokenizer=None, stream=False, skip_special_tokens=False
    )
    row = group.waiting[0]
    row.tokens = list(range(20))
    row.restart()
    group.pages, row.pages = [2, 5], [4]
    other = Group(tuple(range(9)), shared=True, pages=[1])
    cache = new_cache(6)
    one, two = qkv(90, seed=1), qkv(9, seed=2)
    put(cache, group.pages, one[1][:70], one[2][:70])
    mixed = [torch.cat([b, a[70:]]) for a, b in zip(one, two, strict=True)]
    out = PromptAttend(cache, [Piece(other, 0, 9), Piece(row, 0, 20)])(
        0, *mixed, scale=SCALE, window=window, softcap=None
    )
    for got, parts in ((out[:9], two), (out[9:], one)):
        expected = plain_causal(0, *parts, scale=SCALE, window=window, softcap=None)[-len(got) :]
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 9, 75])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("readers", [1, 2, 8])
def test_decoding_rows_attend_over_the_shared_prompt_and_their_own_tokens(window, softcap, readers):
    prompts, prompt_of, stored = [5, 80], [1, 0, 1, 1, None], [0, 17, 70, 30, 66]
    own = [[8], [9], [10, 2], [11, 3], [12, 4]]
    shared = [[7], [6, 5]]
    cache = new_cache(13)
    whole = [qkv(n, seed=n) for n in prompts]
    for pages, (_, k, v) in zip(shared, whole, strict=True):
        put(cache, pages, k, v)
    rows = []
    for row, (group, n) in enumerate(zip(prompt_of, stored, strict=True)):
        mine = qkv(n + 4, seed=100 + row)
        before = whole[group] if group is not None else qkv(0, seed=0)
        rows.append([torch.cat(parts) for parts in zip(before, mine, strict=True)])
        put(cache, own[row], mine[1][:n], mine[2][:n])
    segments = [(1, part) for part in ([0, 2, 3][i : i + readers] for i in range(0, 3, readers))] + [(0, [1])]
    prefix = torch.tensor([0 if g is None else prompts[g] for g in prompt_of], dtype=torch.int32)
    paged = PagedRows(
        own_pages=torch.tensor([[*pages, 0][:2] for pages in own], dtype=torch.int32),
        own_length=torch.tensor(stored, dtype=torch.int32) + 1,
        prefix_length=prefix,
        prefix_pages=torch.tensor([[*shared[g], 0][:2] for g, _ in segments], dtype=torch.int32),
        readers=torch.tensor([[*part, *[-1] * (readers - len(part))] for _, part in segments], dtype=torch.int32),
        own_split=64,
        prefix_split=128,
        own_most=128,
        prefix_most=128,
    )
    for step in range(4):
        at = [(0 if g is None else prompts[g]) + n + step for g, n in zip(prompt_of, stored, strict=True)]
        q, k, v = (torch.stack([rows[r][part][at[r]] for r in range(5)]) for part in range(3))
        out = DecodeAttend(cache, paged)(0, q, k, v, scale=SCALE, window=window, softcap=softcap)
        for r in range(5):
            seen = [part[: at[r] + 1] for part in rows[r]]
            expected = plain_causal(0, *seen, scale=SCALE, window=window, softcap=softcap)[-1]
            torch.testing.assert_close(out[r], expected, atol=1e-12, rtol=0)
        paged.own_length.add_(1)


def test_half_precision_decoding_is_summed_in_fp32():
    q, k, v = (t.bfloat16() for t in qkv(60, seed=3))
    cache = new_cache(2, dtype=torch.bfloat16)
    put(cache, [1], k, v)
    paged = PagedRows(
        torch.tensor([[1]]), torch.tensor([60]), torch.tensor([0]), None, None, 64, 64, own_most=64, prefix_most=64
    )
    out = decode_attention(q[59:], cache.keys[0], cache.values[0], paged, scale=SCALE).view(1, HEADS, WIDTH)
    exact = plain_causal(0, q.double(), k.double(), v.double(), scale=SCALE, window=None, softcap=None)[59:]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), atol=2e-3, rtol=2**-8)


def test_a_step_that_is_recorded_never_asks_for_the_longest_row(monkeypatch):
    """Heads of a width that no kernel serves are rotated and written by torch, in a captured step too."""
    cache, y = new_cache(4), torch.randn(2, (HEADS + 2 * SHARED) * WIDTH, dtype=torch.float64)
    rows = PagedRows(
        torch.tensor([[2], [3]], dtype=torch.int32), torch.tensor([5, 1], dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32), None, None, 64, 64, 64, 64,
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("the host waits for the device"))
    rope_write_reference(y, None, cache.keys[0], cache.values[0], rows, heads=HEADS)
    split = y.view(2, -1, WIDTH)
    assert torch.equal(cache.keys[0][2, :, 4], split[0, HEADS : HEADS + SHARED])
    assert torch.equal(cache.values[0][3, :, 0], split[1, HEADS + SHARED :])

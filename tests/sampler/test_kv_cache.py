import pytest
import torch

from local_tinker.sampler.kv_cache import CacheAttend, DecodeRows, KVCache, PromptPiece, slots_of
from local_tinker.sampler.scheduler import PAGE, pages_for
from tests.sampler.toy import plain_causal

HEADS, SHARED, WIDTH, SCALE = 4, 2, 8, 0.3


def new_cache(tokens=4096, dtype=torch.float64):
    return KVCache(layers=1, kv_heads=SHARED, head_dim=WIDTH, tokens=tokens, dtype=dtype, device="cpu")


def qkv(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, h, WIDTH, generator=generator).double() for h in (HEADS, SHARED, SHARED))


def test_storage_grows_with_the_pages_in_use_and_keeps_what_it_holds():
    cache = new_cache()
    assert cache.tokens == 0
    pages = cache.pool.take(2)
    cache.grow()
    assert cache.tokens == 2 * PAGE
    cache.keys[0][:] = 3.0
    cache.pool.take(3)
    cache.grow()
    assert cache.tokens == 5 * PAGE
    assert cache.keys[0][: 2 * PAGE].eq(3).all() and cache.keys[0][2 * PAGE :].eq(0).all()
    cache.pool.give(pages)
    cache.grow()
    assert cache.tokens == 5 * PAGE


def test_storage_never_passes_its_budget():
    cache = new_cache(tokens=100)
    assert cache.pool.pages == 6
    cache.pool.take(5)
    cache.grow()
    cache.pool.take(1)
    cache.grow()
    assert cache.tokens == 6 * PAGE


@pytest.mark.parametrize("window", [None, 1, 7, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [3, 19, 200])
def test_a_prompt_in_pieces_attends_as_one_whole(window, softcap, chunk, monkeypatch):
    monkeypatch.setattr("local_tinker.sampler.kv_cache._SCORES_PER_CALL", 4 * 50 * 5)
    q, k, v = qkv(50, seed=1)
    cache = new_cache()
    cache.pool.take(3)
    slots = slots_of(torch.tensor(cache.pool.take(pages_for(50))))
    cache.grow()
    parts = []
    for start in range(0, 50, chunk):
        stop = min(50, start + chunk)
        attend = CacheAttend(cache, decode=None, pieces=[PromptPiece(0, start, stop, slots[:stop])])
        cut = slice(start, stop)
        parts.append(attend(0, q[cut], k[cut], v[cut], scale=SCALE, window=window, softcap=softcap))
    expected = plain_causal(0, q, k, v, scale=SCALE, window=window, softcap=softcap)
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 9, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("keys_per_call", [1, 100, 2**15])
def test_decoding_rows_attend_over_the_shared_prompt_and_their_own_tokens(window, softcap, keys_per_call, monkeypatch):
    monkeypatch.setattr("local_tinker.sampler.kv_cache._KEYS_PER_CALL", keys_per_call)
    prompt_lens, prompt_of, stored = [5, 40], [1, 0, 1, 1], [0, 17, 3, 30]
    cache = new_cache()
    prompts = [(cache.pool.take(pages_for(n)), n) for n in prompt_lens]
    suffixes = [cache.pool.take(pages_for(n + 10)) for n in stored]
    cache.grow()
    whole = [qkv(n, seed=n) for n in prompt_lens]
    for (pages, n), (_, k, v) in zip(prompts, whole, strict=True):
        cache.keys[0][slots_of(torch.tensor(pages))[:n]] = k
        cache.values[0][slots_of(torch.tensor(pages))[:n]] = v
    rows = []
    for row, (group, n) in enumerate(zip(prompt_of, stored, strict=True)):
        own = qkv(n + 4, seed=100 + row)
        rows.append([torch.cat([shared, mine]) for shared, mine in zip(whole[group], own, strict=True)])
        slots = slots_of(torch.tensor(suffixes[row]))[:n]
        cache.keys[0][slots], cache.values[0][slots] = own[1][:n], own[2][:n]
    decode = DecodeRows(
        prompts=prompts, prompt_of=prompt_of, suffixes=suffixes, suffix_lens=stored, steps=4, device=cache.device
    )
    for step in range(4):
        at = [prompt_lens[group] + n + step for group, n in zip(prompt_of, stored, strict=True)]
        q, k, v = (torch.stack([rows[r][part][at[r]] for r in range(4)]) for part in range(3))
        attend = CacheAttend(cache, decode=decode, pieces=[])
        out = attend(0, q, k, v, scale=SCALE, window=window, softcap=softcap)
        for r in range(4):
            seen = [part[: at[r] + 1] for part in rows[r]]
            expected = plain_causal(0, *seen, scale=SCALE, window=window, softcap=softcap)[-1]
            torch.testing.assert_close(out[r], expected, atol=1e-12, rtol=0)
        decode.advance()
    assert decode.steps_left == 0


def test_half_precision_decoding_is_summed_in_fp32():
    q, k, v = (t.bfloat16() for t in qkv(60, seed=3))
    cache = new_cache(dtype=torch.bfloat16)
    prompt, own = cache.pool.take(4), cache.pool.take(1)
    cache.grow()
    slots = slots_of(torch.tensor(prompt))[:59]
    cache.keys[0][slots], cache.values[0][slots] = k[:59], v[:59]
    decode = DecodeRows(
        prompts=[(prompt, 59)], prompt_of=[0], suffixes=[own], suffix_lens=[0], steps=1, device=cache.device
    )
    out = CacheAttend(cache, decode=decode, pieces=[])(
        0, q[59:], k[59:], v[59:], scale=SCALE, window=None, softcap=None
    )
    exact = plain_causal(0, q.double(), k.double(), v.double(), scale=SCALE, window=None, softcap=None)[59:]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), atol=2e-3, rtol=2**-8)

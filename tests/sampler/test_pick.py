import math

import pytest
import torch

from local_tinker.model.kernels.draw import BLOCK, gumbel, philox_4x32
from local_tinker.sampler.pick import NO_TOP_K
from local_tinker.sampler.rows import DeviceRows
from local_tinker.sampler.sequence import SamplingParams, derive_seed
from local_tinker.sampler.workspace import pick as pick_rows


def philox_by_hand(counter, key):
    """The paper's ten rounds in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def words(values):
    return [torch.tensor([v]) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert [int(w) for w in philox_4x32(words(counter), words(key))] == answer
    assert philox_by_hand(counter, key) == answer


def pick(logits, params, *, seeds=None, numbers=None, filtered=True):
    """Tokens and log-probs of rows with these settings; seeds and token numbers count up where not given."""
    count = logits.shape[0]
    state = DeviceRows(count, torch.device("cpu")).state
    params = params if isinstance(params, list) else [params] * count
    for name, default in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0), ("top_k", NO_TOP_K)):
        values = [getattr(p, name) or (default if name == "top_k" else 0.0) for p in params]
        getattr(state, name).copy_(torch.tensor(values))
    state.seed.copy_(torch.arange(count) if seeds is None else torch.as_tensor(seeds))
    state.number.copy_(torch.zeros(count) if numbers is None else torch.as_tensor(numbers))
    return pick_rows(logits, state, filtered=filtered)


def test_noise_is_gumbel_of_philox_words_of_seed_number_level_and_index():
    seeds, numbers, index = [0, 2**40 + 7, 2**63 - 1], [0, 5, 2**31 - 1], [0, 1, 49151, 128255]
    for level in (0, 1):
        got = gumbel(torch.tensor(seeds), torch.tensor(numbers), torch.tensor(index), level=level)
        for row, (seed, number) in enumerate(zip(seeds, numbers, strict=True)):
            for column, i in enumerate(index):
                word, *_ = philox_by_hand([i, number, level, 0], [seed % 2**32, seed >> 32])
                exact = -math.log(-math.log1p(-(word + 0.5) / 2**32))
                assert got[row, column].item() == pytest.approx(exact, abs=2e-5)


def test_noise_has_the_gumbel_distribution_over_indices_numbers_and_seeds():
    count = torch.arange(100_000)
    one = torch.zeros(1, dtype=torch.int64)
    for noise in (
        gumbel(one + 11, one, count, level=0),
        gumbel(one.expand(100_000), count, one, level=0),
        gumbel(count, one.expand(100_000), one, level=1),
    ):
        uniform = torch.exp(-torch.exp(-noise.flatten().double()))
        observed = torch.histc(uniform, 100, 0, 1)
        assert chi_square_p(observed, torch.full((100,), 1000.0)) > 1e-4


def test_derived_seeds_differ_by_every_index_and_repeat():
    seeds = {derive_seed(seed, i, j) for seed in range(5) for i in range(20) for j in range(20)}
    assert len(seeds) == 2000
    assert derive_seed(3, 12) != derive_seed(31, 2)
    assert derive_seed(7, 1) == derive_seed(7, 1)
    assert all(0 <= seed < 2**63 for seed in (*seeds, derive_seed(-(10**30), 4)))


def chi_square_p(observed, expected):
    observed, expected = observed.double(), expected.double()
    # cells under 5 expected draws are put together, as the test's approximation asks
    small = expected < 5
    pairs = [(observed[~small], expected[~small])]
    if small.any():
        pairs.append((observed[small].sum()[None], expected[small].sum()[None]))
    observed, expected = (torch.cat(part) for part in zip(*pairs, strict=True))
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum()
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2.0).double(), statistic / 2).item()


def processed(logits, params):
    """The distribution by plain list arithmetic: temperature, top_k, top_p over the rest, min_p."""
    scaled = [value / params.temperature for value in logits]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])
    if params.top_k is not None:
        kept = kept[: params.top_k]
    mass, enough = sum(weights[i] for i in kept), []
    for i in kept:
        if sum(weights[j] for j in enough) >= params.top_p * mass:
            break
        enough.append(i)
    kept = [i for i in enough if weights[i] >= params.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.12},
    "together": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_processed_distribution(name):
    params, draws = SamplingParams(**SETTINGS[name]), 50_000
    logits = torch.randn(30, generator=torch.Generator().manual_seed(5)) * 2
    tokens, _ = pick(logits.expand(draws, -1), params, seeds=torch.full((draws,), 17), numbers=torch.arange(draws))
    expected = torch.tensor(processed(logits.tolist(), params)).double()
    observed = torch.bincount(tokens, minlength=30)
    assert observed[expected == 0].sum() == 0
    assert chi_square_p(observed[expected > 0], expected[expected > 0] * draws) > 1e-4


def test_draws_follow_the_distribution_across_blocks_of_the_vocabulary():
    vocab, draws = 2 * BLOCK + 300, 20_000
    logits = torch.full((vocab,), -20.0)
    chosen = torch.tensor([0, 5, BLOCK - 1, BLOCK, BLOCK + 9, 2 * BLOCK, vocab - 1])
    logits[chosen] = torch.tensor([1.0, 0.0, 2.0, 1.5, -1.0, 0.5, 1.2])
    tokens = torch.cat(
        [
            pick(logits.expand(2000, -1), SamplingParams(), seeds=torch.arange(2000) + i, filtered=False)[0]
            for i in range(0, draws, 2000)
        ]
    )
    expected = torch.softmax(logits[chosen].double(), 0) * draws
    observed = (tokens[:, None] == chosen).sum(0)
    assert observed.sum() >= draws - 2
    assert chi_square_p(observed, expected) > 1e-4


def test_log_probs_are_of_the_full_untempered_distribution_whatever_the_settings():
    rows = [SamplingParams(**changes) for changes in (*SETTINGS.values(), {"temperature": 0.0})]
    logits = torch.randn(len(rows), 1500, generator=torch.Generator().manual_seed(1)) * 4 + 300
    tokens, logprobs = pick(logits, rows)
    for row, token in enumerate(tokens.tolist()):
        values = [x - 300 for x in logits[row].tolist()]
        truth = values[token] - math.log(sum(math.exp(x) for x in values))
        assert logprobs[row].item() == pytest.approx(truth, abs=1e-4)


def test_temperature_zero_takes_the_most_likely_token_whatever_else_is_set():
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(temperature=0, top_p=0.3, top_k=2, min_p=0.5, seed=i) for i in range(40)]
    tokens, logprobs = pick(logits, params)
    assert tokens.tolist() == [max(range(64), key=row.__getitem__) for row in logits.tolist()]
    assert torch.isfinite(logprobs).all() and (logprobs < 0).all()


def test_nearly_zero_temperature_neither_overflows_nor_leaves_the_best_token():
    logits = torch.tensor([[1e4, -1e4, 9.9e3, float("-inf")]])
    for temperature in (1e-30, 1e-7, 1e-3):
        tokens, logprobs = pick(logits, SamplingParams(temperature=temperature))
        assert tokens.tolist() == [0] and logprobs.tolist() == [0.0]


def test_impossible_tokens_are_never_taken():
    logits = torch.tensor([[float("-inf"), 0.3, 1.0, float("-inf"), 0.1, float("-inf")]]).expand(5000, -1)
    for filtered in (False, True):
        drawn, logprob = pick(logits, SamplingParams(), filtered=filtered)
        assert set(drawn.tolist()) == {1, 2, 4} and torch.isfinite(logprob).all()


def test_top_k_keeps_exactly_k_of_equal_tokens_the_lowest_ids_first():
    tokens, _ = pick(torch.zeros(1000, 8), SamplingParams(top_k=3))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_top_p_keeps_the_token_that_reaches_the_share():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(2000, -1)
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (0.99, {0, 1, 2, 3})):
        tokens, _ = pick(logits, SamplingParams(top_p=top_p))
        assert set(tokens.tolist()) == kept


def test_a_row_draws_the_same_beside_any_neighbours():
    rows = [SamplingParams(**changes) for changes in (*SETTINGS.values(), {"temperature": 0.0})] * 3
    logits = torch.randn(len(rows), 1300, generator=torch.Generator().manual_seed(3))
    together, logprobs = pick(logits, rows, numbers=[4] * len(rows))
    for i, params in enumerate(rows):
        alone, logprob = pick(logits[i : i + 1], params, seeds=[i], numbers=[4], filtered=params.filtered)
        assert alone.item() == together[i].item()
        assert logprob.item() == pytest.approx(logprobs[i].item(), abs=1e-6)


def test_large_vocabularies_are_filtered_in_row_blocks_without_a_trace(monkeypatch):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(4)) * 3
    params = [SamplingParams(top_k=5 if i == 4 else None) for i in range(5)]
    whole = pick(logits, params)
    monkeypatch.setattr("local_tinker.sampler.pick._CELLS", 2500)
    cut = pick(logits, params)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])
    assert whole[0][4] in logits[4].topk(5).indices

"""The training benchmark: its counts against figures worked by hand, its parts on a trace of our own, its tiny run."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import meter, ours, trace, train, work

BASE = work.Case(name="", side="ours", model="tiny", longest=64, mean=20.0, rows=2, steps=2, warmup=1)


def test_a_case_is_a_side_and_what_it_changes():
    case = work.parse("ours@loss=grpo@gib=3.6@model=qwen2.5-7b", BASE)
    assert (case.side, case.loss, case.gib, case.model, case.rank) == ("ours", "grpo", 3.6, "qwen2.5-7b", 16)
    assert work.parse("unsloth", BASE).gc == "unsloth" and work.parse("unsloth@gc=0", BASE).gc == "0"
    long = work.parse("trl@context=512", BASE)
    assert (long.longest, long.rows, long.window) == (512, 1, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axolotl", "no side 'axolotl'"),
        ("ours@gc=0", "ours has no setting 'gc=0'; it takes model"),
        ("ours@rank", "no setting 'rank'"),
        ("ours@model=gpt", "no model 'gpt'"),
    ],
)
def test_a_case_that_cannot_be_meant_names_what_can(text, said):
    with pytest.raises(SystemExit, match=said):
        work.parse(text, BASE)


def test_every_named_set_parses():
    for name in train.SETS:
        assert train.cases(name, BASE)


def test_documents_have_the_lengths_asked_for_and_the_same_ids_for_every_side():
    case = work.parse("ours@mean=500@longest=2048@share=0.5", replace(BASE, steps=200))
    docs, again = (
        work.documents(case),
        work.documents(work.parse("trl@mean=500@longest=2048@share=0.5", replace(BASE, steps=200))),
    )
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(docs, again, strict=True))
    lengths = np.array([len(doc.tokens) for doc in docs])
    assert abs(lengths.mean() / 500 - 1) < 0.06 and lengths.max() <= 2048
    assert all(doc.labels.count(-100) == doc.start == round(len(doc.tokens) * 0.5) for doc in docs)


def test_a_window_is_whole_documents_within_its_rows():
    windows = work.windows(BASE, work.documents(BASE))
    sizes = [sum(len(doc.tokens) for doc in micro) for window in windows for micro in window]
    assert all(len(window) == 2 for window in windows) and len(windows) > BASE.warmup + BASE.steps
    assert max(sizes) <= 128 and np.mean(sizes) > 115


def test_flops_are_those_counted_by_hand():
    # tiny: H 64, F 128, 2 layers, 4 heads of 16, 2 key-value heads, V 512; rank 4
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    lora = 2 * 4 * (3 * (64 + 0) + 64 + 32 + 32 + 64 + 64 + 3 * (64 + 128))
    assert work.dims("tiny").linear_params == linear and work.dims("tiny").lora_params(4) == lora
    case = work.parse("ours", BASE)
    attention = 3.5 * (2 + 2) * 10 * 64 * 2  # scores and values, 10 keys, 64 wide, 2 layers
    assert meter.flops_per_token(case, keys=10, share=0.5) == 4 * linear + 6 * lora + 4 * 512 * 64 / 2 + attention


def test_the_meter_reads_packed_and_padded_batches_alike():
    import torch

    packed, padded = meter.Meter("cpu"), meter.Meter("cpu")
    packed.add_batch(
        {
            "input_ids": torch.zeros(1, 5, dtype=torch.long),
            "labels": torch.tensor([[-100, 7, 7, -100, 7]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 5], dtype=torch.int32),
        }
    )
    padded.add_batch(
        {
            "input_ids": torch.zeros(2, 3, dtype=torch.long),
            "labels": torch.tensor([[-100, 7, 7], [-100, 7, -100]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        }
    )
    for one in (packed, padded):
        assert (float(one.tokens), float(one.keys), float(one.loss_tokens)) == (5, 9, 3)


def test_the_search_for_the_longest_context_ends_at_the_limit():
    for limit in (0, 4096, 69_000, 81_920, 100_000):
        tried = []

        def trains(tokens, limit=limit, tried=tried):
            tried.append(tokens)
            return tokens <= limit

        assert ours.search(trains, 81_920) == limit // 4096 * 4096
        assert len(set(tried)) == len(tried) <= 8


# launches happen on thread 1; the kernels they start run later on the device
def _cpu(name, start, duration, dims=(), cat="cpu_op"):
    return {
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": duration,
        "tid": 1,
        "args": {"Input Dims": [list(d) for d in dims]},
    }


def _launched(name, id, launch, start, duration, cat="kernel"):
    return [
        {
            "cat": "cuda_runtime",
            "name": "cudaLaunchKernel",
            "ts": launch,
            "dur": 1,
            "tid": 1,
            "args": {"correlation": id},
        },
        {"cat": cat, "name": name, "ts": start, "dur": duration, "tid": 7, "args": {"correlation": id}},
    ]


def test_kernels_go_to_the_part_that_launched_them():
    events = [
        _cpu("forward_backward", 0, 100, cat="user_annotation"),
        _cpu("aten::mm", 10, 5, dims=[(64, 128), (128, 256)]),
        *_launched("nvjet_tst_128x256", 1, 12, 200, 40),
        _cpu("aten::mm", 20, 5, dims=[(64, 128), (128, 512)]),
        *_launched("nvjet_tst_128x256", 2, 22, 240, 20),
        _cpu("aten::mul", 30, 5),
        *_launched("vectorized_elementwise_kernel", 3, 32, 260, 10),
        *_launched("kDequantizeBlockwise", 4, 40, 270, 5),
        *_launched("flash_fwd_kernel", 5, 45, 290, 10),
        *_launched("_rotate_heads", 8, 47, 300, 1),
        *_launched("Memcpy HtoD", 6, 50, 301, 2, cat="gpu_memcpy"),
        _cpu("optim_step", 110, 10, cat="user_annotation"),
        *_launched("vectorized_elementwise_kernel", 7, 112, 310, 3),
    ]
    found = trace.kernels(events)
    own = {"_rotate_heads": "rope"}
    parts = trace.by_part(found, vocab=512, own=own)
    assert {k: round(v * 1000) for k, v in parts.items()} == {
        "gemm": 40,
        "attention": 10,
        "head": 20,
        "elementwise": 10,
        "dequantise": 5,
        "optimiser": 3,
        "copies": 2,
        "rope": 1,
        "host_gap": 113 - 91,
        "span": 113,
    }
    host = trace.host_times(events)
    assert host == {"forward_backward": 0.1, "optim_step": 0.01}
    text = trace.report("ours", found, parts, vocab=512, own=own, host=host)
    rate = 2 * 64 * 128 * 256 / 40e-6 / 1e12
    assert f"{rate:.0f}  gemm         nvjet_tst_128x256  64 x 128 x 256" in text


def test_our_kernels_are_known_by_the_module_that_defines_them():
    pytest.importorskip("triton")
    own = trace.own_kernels()
    assert {"dequantise", "attention", "norm"} <= set(own.values())


def test_the_tiny_run_measures_both_sides_on_the_same_documents_and_outlives_a_failing_case(tmp_path):
    options = ["--tiny", "--cases", "glue@gib=1,ours,trl", "--profile", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.train", *options], capture_output=True, text=True)
    assert done.returncode == 1 and "1 of the cases failed" in done.stderr, done.stdout + done.stderr
    (written,) = tmp_path.glob("train_*.json")
    record = json.loads(written.read_text())
    glue, ours_, trl = record["figures"]["results"]
    assert "Error" in glue["error"] and "tokens_s" not in glue  # a CPU has no allocator to cap
    for result in (ours_, trl):
        # random weights: a flat distribution over 512 tokens, ln 512 = 6.238
        assert abs(result["loss_value"] - 6.238) < 0.1
        assert result["mfu"] == pytest.approx(
            result["tokens_s"] * result["gflop_a_token"] / 1e3 / record["figures"]["card"]["tflops"], rel=0.02
        )
    assert abs(trl["tokens_a_step"] / ours_["tokens_a_step"] - 1) < 0.15  # 4 rows of at most 64 tokens each
    assert ours_["parts_ms"]["head"] > 0
    assert "| tiny r4 | mean 20, at most 64 | trl |" in written.with_suffix(".md").read_text()
    assert [json.loads(line).get("case") for line in (tmp_path / "train.jsonl").read_text().splitlines()] == [
        None,
        "glue@gib=1",
        "ours",
        "trl",
    ]

"""Causal attention over packed documents, forward and backward, with windows, soft caps and shared key-value heads.

FlashAttention-2's arithmetic (arXiv 2307.08691) with two choices of its own. The backward never adds through atomics: one
kernel owns a block of queries and gives dq, another owns a block of keys and gives dk and dv over all query heads that
share them. So gradients are the same bits every time, nothing is expanded to the query heads, and dq, dk and dv land in
the caller's buffer. The definition is `model.attention.attend_reference`.

Documents that go on from a common prefix stand behind it, one after the other: their queries walk the prefix's keys and
then their own. What all queries behind give to the prefix's keys is summed in pieces by a kernel before, in fp32, so that
no block of keys walks thousands of queries alone, and the pieces are added in one order.

Shapes: N packed tokens, Hq query heads, Hkv key-value heads, G = Hq / Hkv, D head dimension.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import power_of_two, tl, triton
from .launch import kernel
from .packed_blocks import PackedBlocks, Tuning, tuning


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks, *, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """q (N, Hq, D), k, v (N, Hkv, D), or as many as `blocks` has keys, heads and dimensions without gaps -> out
    (N, Hq, D), log-sum-exp (Hq, N) base 2."""
    n, heads, d = q.shape
    out = torch.empty((n, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, n), dtype=torch.float32, device=q.device)
    own, look, warps, stages = _tuning(q, blocks).forward
    work = blocks.of(own, keys=False)
    _forward[(work.shape[0], heads)](
        q, k, v, out, lse, work, n, q.stride(0), k.stride(0), v.stride(0), scale, softcap or 1.0,
        HQ=heads, **_constants(q, k, window, softcap, blocks), BM=own, BN=look, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def attend_packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: PackedBlocks,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `into` = dq (N, Hq, D), dk, dv (N, Hkv, D), which may be parts of one wide buffer."""
    n, heads, _ = q.shape
    dq, dk, dv = into
    dots = torch.empty_like(lse)  # sum over D of dout * out, made by the first kernel for the second
    constants = _constants(q, k, window, softcap, blocks)
    own, look, warps, stages = _tuning(q, blocks).query
    work = blocks.of(own, keys=False)
    _backward_queries[(work.shape[0], heads)](
        q, k, v, out, dout, lse, dots, dq, work, n, q.stride(0), k.stride(0), v.stride(0), dout.stride(0), dq.stride(0),
        scale, softcap or 1.0, HQ=heads, **constants, BM=own, BN=look, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    own, look, warps, stages = _tuning(q, blocks).key
    work, behind, splits = blocks.of(own, keys=True), lse, 0
    common = (q.stride(0), k.stride(0), v.stride(0), dout.stride(0))
    tuned = dict(constants, BN=own, BM=look, num_warps=warps, num_stages=stages)
    if blocks.prefixes:
        splits, prefix = blocks.splits, blocks.prefix_keys(own)
        behind = torch.empty((splits, 2, blocks.prefix_tokens, *k.shape[1:]), dtype=torch.float32, device=k.device)
        _backward_behind[(prefix.shape[0] * splits, k.shape[1])](
            q, k, v, dout, lse, dots, behind, prefix, blocks.positions, n, splits, blocks.prefix_tokens, *common, scale,
            softcap or 1.0, **{name: value for name, value in tuned.items() if name != "PREFIX"},
        )  # fmt: skip
    _backward_keys[(work.shape[0], k.shape[1])](
        q, k, v, dout, lse, dots, dk, dv, behind, work, n, splits, blocks.prefix_tokens, *common, dk.stride(0),
        dv.stride(0), scale, softcap or 1.0, **tuned,
    )  # fmt: skip


def _tuning(q: Tensor, blocks: PackedBlocks) -> Tuning:
    return tuning(q.shape[-1], _capability(q.get_device()), blocks.length)


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device >= 0 else (0, 0)


def _constants(q: Tensor, k: Tensor, window: int | None, softcap: float | None, blocks: PackedBlocks) -> dict:
    d = q.shape[-1]
    return dict(
        G=q.shape[1] // k.shape[1],
        D=d,
        DB=power_of_two(d, 16),
        WINDOW=window or 0,
        CAP=softcap is not None,
        PREFIX=blocks.prefixes,
    )


if triton is not None:
    # N changes with every micro-batch; specialised, its multiples of 16 would be compiled apart in the middle of a run.

    @triton.jit
    def _tile(P, at, row_stride, ok, D: tl.constexpr, DB: tl.constexpr):
        """Rows `at` of a head (rows, DB); rows that are not ok, and dimensions past D, are 0."""
        d = tl.arange(0, DB)
        mask = ok[:, None]
        if D != DB:
            mask = mask & (d[None, :] < D)
        return tl.load(P + at.to(tl.int64)[:, None] * row_stride + d[None, :], mask=mask, other=0.0)

    @triton.jit
    def _put(P, at, row_stride, ok, value, D: tl.constexpr, DB: tl.constexpr):
        d = tl.arange(0, DB)
        mask = ok[:, None] & (d[None, :] < D)
        tl.store(P + at.to(tl.int64)[:, None] * row_stride + d[None, :], value.to(P.dtype.element_ty), mask=mask)

    @triton.jit
    def _scores(raw, scale, cap, CAP: tl.constexpr):
        """q k^T -> scores in base 2, and the slope that the cap puts on their gradient."""
        s = raw * scale
        slope = 1.0
        if CAP:
            t = 2.0 * tl.sigmoid(2.0 * s / cap) - 1.0
            s = cap * t
            slope = 1.0 - t * t
        return s * 1.4426950408889634, slope

    @triton.jit
    def _sees(rows, keys, length, WINDOW: tl.constexpr):
        """Whether query `rows` see `keys`, both positions in one document of which there are `length` keys, broadcast
        against each other. Rows past the end are zeros or are not stored."""
        seen = (keys <= rows) & (keys < length)
        if WINDOW > 0:
            seen = seen & (keys > rows - WINDOW)
        return seen

    @triton.jit
    def _own_span(first, WINDOW: tl.constexpr, BN: tl.constexpr):
        """Where a query block's own keys start, and up to where all of its queries see all of them."""
        whole = first // BN * BN
        low = 0
        if WINDOW > 0:
            low = tl.maximum(first - WINDOW + 1, 0) // BN * BN
            whole = low
        return low, whole

    @triton.jit
    def _prefix_span(first, before, WINDOW: tl.constexpr, BN: tl.constexpr):
        """Where a query block's keys in the prefix start, and where the last, partial block of them does."""
        low = 0
        if WINDOW > 0:
            low = tl.maximum(before + first - WINDOW + 1, 0) // BN * BN
        return low, before // BN * BN

    @triton.jit
    def _forward_step(
        acc, m, total, q, K, V, rows, n0, length, k_row, v_row, scale, cap,
        D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    ):  # fmt: skip
        keys = n0 + tl.arange(0, BN)
        ok = keys < length
        k = _tile(K, keys, k_row, ok, D, DB)
        s, _ = _scores(tl.dot(q, tl.trans(k)), scale, cap, CAP)
        if MASK:
            s = tl.where(_sees(rows[:, None], keys[None, :], length, WINDOW), s, -1.0e30)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        keep = tl.exp2(m - new)
        total = total * keep + tl.sum(p, 1)
        v = _tile(V, keys, v_row, ok, D, DB)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v)
        return acc, new, total

    @kernel(do_not_specialize=["N"])
    def _forward(
        Q, K, V, OUT, LSE, WORK, N, q_row, k_row, v_row, scale, cap,
        HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        PREFIX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        block, h = tl.program_id(0), tl.program_id(1)
        start = tl.load(WORK + 6 * block).to(tl.int64)
        first = tl.load(WORK + 6 * block + 1)
        length = tl.load(WORK + 6 * block + 2)
        rows = first + tl.arange(0, BM)
        ok = rows < length
        q = _tile(Q + start * q_row + h * D, rows, q_row, ok, D, DB)
        m = tl.full([BM], -1.0e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DB], tl.float32)
        if PREFIX:
            p_start = tl.load(WORK + 6 * block + 4).to(tl.int64)
            before = tl.load(WORK + 6 * block + 5)
            PK, PV = K + p_start * k_row + (h // G) * D, V + p_start * v_row + (h // G) * D
            low, whole = _prefix_span(first, before, WINDOW, BN)
            for n0 in range(low, whole, BN):
                acc, m, total = _forward_step(
                    acc, m, total, q, PK, PV, before + rows, n0, before, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP,
                    WINDOW > 0,
                )  # fmt: skip
            for n0 in range(tl.maximum(low, whole), before, BN):
                acc, m, total = _forward_step(
                    acc, m, total, q, PK, PV, before + rows, n0, before, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP,
                    True,
                )  # fmt: skip
        k_start = tl.load(WORK + 6 * block + 3).to(tl.int64)
        K += k_start * k_row + (h // G) * D
        V += k_start * v_row + (h // G) * D
        low, whole = _own_span(first, WINDOW, BN)
        for n0 in range(low, whole, BN):  # all of these keys are seen by all of these queries
            acc, m, total = _forward_step(
                acc, m, total, q, K, V, rows, n0, length, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP, False
            )
        for n0 in range(whole, tl.minimum(first + BM, length), BN):
            acc, m, total = _forward_step(
                acc, m, total, q, K, V, rows, n0, length, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP, True
            )
        _put(OUT + start * (HQ * D) + h * D, rows, HQ * D, ok, acc / total[:, None], D, DB)
        tl.store(LSE + h.to(tl.int64) * N + start + rows, m + tl.log2(total), mask=ok)

    @triton.jit
    def _queries_step(
        dq, q, do, lse, dots, K, V, rows, n0, length, k_row, v_row, scale, cap,
        D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    ):  # fmt: skip
        keys = n0 + tl.arange(0, BN)
        ok = keys < length
        k = _tile(K, keys, k_row, ok, D, DB)
        v = _tile(V, keys, v_row, ok, D, DB)
        s, slope = _scores(tl.dot(q, tl.trans(k)), scale, cap, CAP)
        p = tl.exp2(s - lse[:, None])
        if MASK:
            p = tl.where(_sees(rows[:, None], keys[None, :], length, WINDOW), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - dots[:, None]) * slope
        return dq + tl.dot(ds.to(k.dtype), k)

    @kernel(do_not_specialize=["N"])
    def _backward_queries(
        Q, K, V, OUT, DO, LSE, DOTS, DQ, WORK, N, q_row, k_row, v_row, do_row, dq_row, scale, cap,
        HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        PREFIX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        block, h = tl.program_id(0), tl.program_id(1)
        start = tl.load(WORK + 6 * block).to(tl.int64)
        first = tl.load(WORK + 6 * block + 1)
        length = tl.load(WORK + 6 * block + 2)
        rows = first + tl.arange(0, BM)
        ok = rows < length
        q = _tile(Q + start * q_row + h * D, rows, q_row, ok, D, DB)
        do = _tile(DO + start * do_row + h * D, rows, do_row, ok, D, DB)
        out = _tile(OUT + start * (HQ * D) + h * D, rows, HQ * D, ok, D, DB)
        at = h.to(tl.int64) * N + start + rows
        lse = tl.load(LSE + at, mask=ok, other=0.0)
        dots = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(DOTS + at, dots, mask=ok)
        dq = tl.zeros([BM, DB], tl.float32)
        if PREFIX:
            p_start = tl.load(WORK + 6 * block + 4).to(tl.int64)
            before = tl.load(WORK + 6 * block + 5)
            PK, PV = K + p_start * k_row + (h // G) * D, V + p_start * v_row + (h // G) * D
            low, whole = _prefix_span(first, before, WINDOW, BN)
            for n0 in range(low, whole, BN):
                dq = _queries_step(
                    dq, q, do, lse, dots, PK, PV, before + rows, n0, before, k_row, v_row, scale, cap, D, DB, BN, WINDOW,
                    CAP, WINDOW > 0,
                )  # fmt: skip
            for n0 in range(tl.maximum(low, whole), before, BN):
                dq = _queries_step(
                    dq, q, do, lse, dots, PK, PV, before + rows, n0, before, k_row, v_row, scale, cap, D, DB, BN, WINDOW,
                    CAP, True,
                )  # fmt: skip
        K += start * k_row + (h // G) * D
        V += start * v_row + (h // G) * D
        low, whole = _own_span(first, WINDOW, BN)
        for n0 in range(low, whole, BN):
            dq = _queries_step(
                dq, q, do, lse, dots, K, V, rows, n0, length, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP, False
            )
        for n0 in range(whole, tl.minimum(first + BM, length), BN):
            dq = _queries_step(
                dq, q, do, lse, dots, K, V, rows, n0, length, k_row, v_row, scale, cap, D, DB, BN, WINDOW, CAP, True
            )
        _put(DQ + start * dq_row + h * D, rows, dq_row, ok, dq * scale, D, DB)

    @triton.jit
    def _keys_step(
        dk, dv, k, v, Q, DO, LSE, DOTS, keys, rows, at, length, q_row, do_row, scale, cap, D: tl.constexpr,
        DB: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    ):  # fmt: skip
        """Queries `rows` of a document or behind it, of `length` in all, whose positions in the document are `at`."""
        ok = rows < length
        q = _tile(Q, rows, q_row, ok, D, DB)
        do = _tile(DO, rows, do_row, ok, D, DB)
        lse = tl.load(LSE + rows, mask=ok, other=0.0)
        dots = tl.load(DOTS + rows, mask=ok, other=0.0)
        s, slope = _scores(tl.dot(k, tl.trans(q)), scale, cap, CAP)  # (keys, queries)
        p = tl.exp2(s - lse[None, :])
        if MASK:
            seen = keys[:, None] <= at[None, :]
            if WINDOW > 0:
                seen = seen & (keys[:, None] > at[None, :] - WINDOW)
            p = tl.where(seen, p, 0.0)
        dv += tl.dot(p.to(do.dtype), do)
        ds = p * (tl.dot(v, tl.trans(do)) - dots[None, :]) * slope
        dk += tl.dot(ds.to(q.dtype), q)
        return dk, dv

    @kernel(do_not_specialize=["N", "splits", "prefix_tokens"])
    def _backward_behind(
        Q, K, V, DO, LSE, DOTS, BEHIND, WORK, POSITIONS, N, splits, prefix_tokens, q_row, k_row, v_row, do_row, scale, cap,
        G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        BN: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        """What one piece of the queries behind a prefix gives to a block of the prefix's keys."""
        block, piece, g = tl.program_id(0) // splits, tl.program_id(0) % splits, tl.program_id(1)
        start = tl.load(WORK + 6 * block).to(tl.int64)
        keys = tl.load(WORK + 6 * block + 1) + tl.arange(0, BN)
        ok = keys < tl.load(WORK + 6 * block + 2)
        behind = tl.load(WORK + 6 * block + 3).to(tl.int64)
        count = tl.load(WORK + 6 * block + 4)
        among = tl.load(WORK + 6 * block + 5)
        k = _tile(K + start * k_row + g * D, keys, k_row, ok, D, DB)
        v = _tile(V + start * v_row + g * D, keys, v_row, ok, D, DB)
        dk = tl.zeros([BN, DB], tl.float32)
        dv = tl.zeros([BN, DB], tl.float32)
        size = tl.cdiv(tl.cdiv(count, splits), BM) * BM
        stop = tl.minimum(count, (piece + 1) * size)
        for i in range(G):
            h = g * G + i
            line = h.to(tl.int64) * N + behind
            for m0 in range(piece * size, stop, BM):
                rows = m0 + tl.arange(0, BM)
                at = rows
                if WINDOW > 0:
                    at = tl.load(POSITIONS + behind + rows, mask=rows < stop, other=0)
                dk, dv = _keys_step(
                    dk, dv, k, v, Q + behind * q_row + h * D, DO + behind * do_row + h * D, LSE + line, DOTS + line, keys,
                    rows, at, stop, q_row, do_row, scale, cap, D, DB, WINDOW, CAP, WINDOW > 0,
                )  # fmt: skip
        width = tl.num_programs(1) * D
        to = BEHIND + (2 * piece * prefix_tokens + among).to(tl.int64) * width + g * D
        _put(to, keys, width, ok, dk, D, DB)
        _put(to + prefix_tokens.to(tl.int64) * width, keys, width, ok, dv, D, DB)

    @kernel(do_not_specialize=["N", "splits", "prefix_tokens"])
    def _backward_keys(
        Q, K, V, DO, LSE, DOTS, DK, DV, BEHIND, WORK, N, splits, prefix_tokens, q_row, k_row, v_row, do_row, dk_row, dv_row,
        scale, cap, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
        PREFIX: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    ):  # fmt: skip
        block, g = tl.program_id(0), tl.program_id(1)
        start = tl.load(WORK + 6 * block).to(tl.int64)
        first = tl.load(WORK + 6 * block + 1)
        length = tl.load(WORK + 6 * block + 2)
        keys = first + tl.arange(0, BN)
        ok = keys < length
        k = _tile(K + start * k_row + g * D, keys, k_row, ok, D, DB)
        v = _tile(V + start * v_row + g * D, keys, v_row, ok, D, DB)
        dk = tl.zeros([BN, DB], tl.float32)
        dv = tl.zeros([BN, DB], tl.float32)
        if PREFIX:
            among = tl.load(WORK + 6 * block + 4)
            width = tl.num_programs(1) * D
            for piece in range(0, tl.where(among < 0, 0, splits)):
                part = BEHIND + (2 * piece * prefix_tokens + among).to(tl.int64) * width + g * D
                dk += _tile(part, keys, width, ok, D, DB)
                dv += _tile(part + prefix_tokens.to(tl.int64) * width, keys, width, ok, D, DB)
        stop = length
        if WINDOW > 0:
            stop = tl.minimum(length, first + BN + WINDOW - 1)
        near = tl.minimum(stop, first + BN)  # from here on every query sees every key, but for a window and the end
        for i in range(G):
            h = g * G + i
            q, do = Q + start * q_row + h * D, DO + start * do_row + h * D
            line = h.to(tl.int64) * N + start
            for m0 in range(first, near, BM):
                rows = m0 + tl.arange(0, BM)
                dk, dv = _keys_step(
                    dk, dv, k, v, q, do, LSE + line, DOTS + line, keys, rows, rows, length, q_row, do_row, scale, cap,
                    D, DB, WINDOW, CAP, True,
                )  # fmt: skip
            for m0 in range(first + BN, stop, BM):
                rows = m0 + tl.arange(0, BM)
                dk, dv = _keys_step(
                    dk, dv, k, v, q, do, LSE + line, DOTS + line, keys, rows, rows, length, q_row, do_row, scale, cap,
                    D, DB, WINDOW, CAP, WINDOW > 0,
                )  # fmt: skip
        _put(DK + start * dk_row + g * D, keys, dk_row, ok, dk * scale, D, DB)
        _put(DV + start * dv_row + g * D, keys, dv_row, ok, dv, D, DB)

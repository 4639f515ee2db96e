"""Frozen base projections: dense, NF4 or int8 storage behind one `dense()`.

bitsandbytes quantises and dequantises; no bitsandbytes module ever runs a forward (its CPU path repacks NF4 weights in
place, and its int8 module computes two different functions in train and eval mode).

Shapes: N packed tokens, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, UsageError
from .kernels.nf4 import Packed

QUANTISERS = (None, "4bit", "8bit")
ONEDNN_ROWS = 128
NF4_BLOCK = 64  # weights that share one absmax (Dettmers et al., arXiv 2305.14314)


def bitsandbytes() -> ModuleType:
    """Import bitsandbytes without letting it look for kernels on a hub, which it does at import on some CPUs, or compile
    optimisers and paths that are not used here, for which it loads all of torch's compiler: seconds of every start."""
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    hidden, compiler = sys.modules.get("kernels"), torch.compile
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # an import of it fails, and bitsandbytes goes on without
    torch.compile = _left_as_it_is
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise MissingDependencyError(
            f"quantize= needs bitsandbytes, which did not import ({error}); pip install 'bitsandbytes>=0.50', or quantize=None"
        ) from error
    finally:
        torch.compile = compiler
        log.setLevel(level)
        if hidden is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hidden
    return bitsandbytes


def _left_as_it_is(function: Callable | None = None, **_: Any) -> Callable:
    """In place of torch.compile, with arguments or without."""
    return function if function is not None else lambda decorated: decorated


class DenseWeight:
    """The weight as it is, already in the compute type."""

    kind = "dense"

    def __init__(self, weight: Tensor) -> None:
        self.stored = weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.stored.to(dtype)

    def dense_into(self, out: Tensor) -> None:
        out.copy_(self.stored)

    def tensors(self) -> list[Tensor]:
        return [self.stored]


class NF4Weight:
    """4-bit NormalFloat in blocks of 64 with double-quantised absmax (QLoRA, arXiv 2305.14314, section 3)."""

    kind = "nf4"

    def __init__(self, weight: Tensor) -> None:
        functional = bitsandbytes().functional
        source = weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()
        self.stored, self.state = functional.quantize_4bit(
            source.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )

    def dense_into(self, out: Tensor) -> None:
        out.copy_(self.dense(out.dtype))  # groups of these dequantise through `Packed` on a card

    def dense(self, dtype: torch.dtype) -> Tensor:
        self.state.dtype = dtype if dtype != torch.float64 else torch.float32
        return bitsandbytes().functional.dequantize_4bit(self.stored, self.state).to(dtype)

    def tensors(self) -> list[Tensor]:
        nested = self.state.state2
        return [self.stored, self.state.absmax, self.state.offset, nested.absmax]


class Int8Weight:
    """One absmax a row, int8 values: W ~ q * absmax / 127. Weight-only; activations are never quantised."""

    kind = "int8"

    def __init__(self, weight: Tensor) -> None:
        # The op is defined for fp16; weights of language models are far inside its range.
        self.stored, self.absmax, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16))

    def dense(self, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.stored.to(wide) * (self.absmax.to(wide) / 127.0)[:, None]).to(dtype)

    def dense_into(self, out: Tensor) -> None:
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        torch.mul(self.stored, (self.absmax.to(wide) / 127.0)[:, None], out=out)  # `dense` without its fp32 copies

    def tensors(self) -> list[Tensor]:
        return [self.stored, self.absmax]


STORAGES = {None: DenseWeight, "4bit": NF4Weight, "8bit": Int8Weight}


class FrozenLinear(nn.Linear):
    """A base projection that never trains. A subclass of `nn.Linear` so that PEFT wraps it like any other.

    `dense()` gives the (O, I) weight in the compute type: the resident copy while `hold()` is in force, a fresh one
    otherwise. Both hold the same bits, so residency changes speed and memory, never a result.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, quantize: str | None, dtype: torch.dtype, path: str
    ) -> None:
        nn.Module.__init__(self)
        if quantize not in STORAGES:
            raise UsageError(f"quantize={quantize!r} is not known; use one of '4bit', '8bit' or None")
        self.out_features, self.in_features = weight.shape
        self.dtype, self.path = dtype, path
        self.store = STORAGES[quantize](weight)
        # PEFT reads `weight` for its device (and dtype where that is floating).
        self.weight = nn.Parameter(self.store.stored, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self._resident: Tensor | None = None

    @property
    def storage(self) -> str:
        return self.store.kind

    @property
    def held(self) -> bool:
        return self._resident is not None

    def hold(self) -> None:
        """Keep a dense copy: 2 bytes a weight in bf16, saved at every forward and backward."""
        if self._resident is None and self.storage != "dense":
            self._resident = self.store.dense(self.dtype)

    def share(self, dense: Tensor) -> None:
        """Take a view of a buffer that already holds this weight: as the resident copy, or as the weight itself where it
        is stored dense anyway."""
        if self.storage == "dense":
            self.store.stored = dense
            self.weight = nn.Parameter(dense, requires_grad=False)
        else:
            self._resident = dense

    def release(self) -> None:
        self._resident = None

    def dense(self) -> Tensor:
        return self._resident if self._resident is not None else self.store.dense(self.dtype)

    def dense_into(self, out: Tensor) -> None:
        """Write the dense weight into `out` (O, I), whose rows may be part of something wider."""
        if self._resident is not None:
            out.copy_(self._resident)
        else:
            self.store.dense_into(out)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenMatmul.apply(x, self)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.store.tensors())

    def digest(self) -> bytes:
        """SHA-256 of the stored bytes: equal before and after training, or the base has changed."""
        sha = hashlib.sha256()
        for tensor in self.store.tensors():
            sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return sha.digest()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, storage={self.storage}"


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b (N, O) of the few rows of a decoding step; nothing is recorded for a backward."""
    if not _onednn_serves(x, weight):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """For few fp32 rows oneDNN takes 0.5 to 0.7 of the time of the library that torch multiplies with on a CPU. For many
    there is little to win, and rows of the weight that are part of something wider it multiplies a hundred times slower."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and 0 < x.shape[0] <= ONEDNN_ROWS
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_together(linears: Sequence[FrozenLinear]) -> Packed | None:
    """Linears of the same inputs as one launch dequantises them; None where they are not all NF4."""
    stores = [linear.store for linear in linears]
    four_bit = all(isinstance(store, NF4Weight) for store in stores)
    return Packed([(store.stored, store.state) for store in stores]) if four_bit else None


class FrozenMatmul(torch.autograd.Function):
    """y = x W^T + b with W dequantised again in backward instead of being kept: dx = dy W, nothing saved."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dense(), linear.bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.linear.dense(), None

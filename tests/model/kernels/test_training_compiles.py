"""Every kernel compiles for the cards we claim, without one, and asks for no more shared memory than they have."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from local_tinker.model.kernels import attention, fp8, head, lora, nf4, norm, packed_blocks, rope, swiglu  # noqa: E402

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of one program, CUDA's tables
HALF, WIDE, INT, REAL = "*bf16", "*fp32", "i32", "fp32"
HEADS = dict(G=3, D=128, DB=128, WINDOW=0, CAP=False, PREFIX=True)
ROPE = dict(HQ=24, HK=8, D=128, J=64, JB=64, NORM=True, KIND=0, EPS=1e-5, ROUND=True, QB=32, KB=8)


def kinds(kernel, types: str) -> dict[str, str]:
    """Types of the kernel's run-time arguments, in order, one letter each."""
    letters = {"h": HALF, "w": WIDE, "i": INT, "r": REAL, "b": "*u8", "n": "*i32", "l": "*i64", "e": "*fp8e4nv"}
    return dict(zip(kernel.arg_names, [letters[t] for t in types], strict=False))


def attention_cases(capability, head_dim=128):
    chosen = packed_blocks.tuning(head_dim, capability, 500.0)
    wide = dict(HEADS, D=head_dim, DB=head_dim)
    without_prefix = {name: value for name, value in wide.items() if name != "PREFIX"}
    f, q, k = chosen.forward, chosen.query, chosen.key
    return [
        (attention._forward, "hhhhwniiiirr", wide | dict(HQ=24, BM=f.own, BN=f.look), f),
        (attention._backward_queries, "hhhhhwwhniiiiiirr", wide | dict(HQ=24, BM=q.own, BN=q.look), q),
        (attention._backward_keys, "hhhhwwhhwniiiiiiiiirr", wide | dict(BN=k.own, BM=k.look), k),
        (attention._backward_behind, "hhhhwwwnniiiiiiirr", without_prefix | dict(BN=k.own, BM=k.look), k),
    ]


PLAIN = [
    (norm._add_norm, "hhhhhiriiii", dict(ADD=True, KIND=0, BLOCK=4096), (0, 0, 8, 3)),
    (norm._norm_backward, "hhhhhhiriiiii", dict(RESIDUAL=True, AGAIN=True, KIND=2, BLOCK=4096), (0, 0, 8, 3)),
    (rope._rotate, "hhhhhhii", ROPE, (0, 0, 4, 3)),
    (rope._rotate_back, "hhhhhhii", ROPE, (0, 0, 4, 3)),
    (swiglu._gated, "hhii", dict(KIND=0, BLOCK=1024), (0, 0, 4, 3)),
    (swiglu._gated_backward, "hhiii", dict(KIND=2, BLOCK=1024), (0, 0, 4, 3)),
    (nf4._nf4_dense, "bbwwi" * 3 + "wwhi", dict(PARTS=3, K=3072, BS=64, BS2=256, BLOCK=2048), (0, 0, 8, 3)),
    (lora._block_diagonal, "hhhhiiiiiiiiir", dict(R=32, ROWS=64, WB=128), (0, 0, 4, 3)),
    (lora._add_diagonal, "wwwwiiiiiiir", dict(R=32, ROWS=64, RB=32), (0, 0, 4, 3)),
    (head._logit_rows, "wlwwhiiirr", dict(CAP=True, ENTROPY=True, GRAD=True, BLOCK=4096), (0, 0, 16, 3)),
]

FP8 = (fp8._quantise_rows, "hewii", dict(INVERSE=1 / 448, BLOCK=4096), (0, 0, 8, 3))


def compiled_shared(kernel, types, constants, tuned, capability):
    signature = kinds(kernel, types) | {name: "constexpr" for name in constants}
    assert set(signature) == set(kernel.arg_names), "the table above does not match the kernel"
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    options = {"num_warps": tuned[2], "num_stages": tuned[3]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made.metadata.shared


@pytest.mark.parametrize("capability", [86, 90, *(pytest.param(c, marks=pytest.mark.battery) for c in (80, 89))])
def test_attention_compiles_and_fits_for_every_card(capability):
    pair = divmod(capability, 10)
    for case in attention_cases(pair):
        assert compiled_shared(*case, capability) <= SHARED[capability]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case[0].__name__)
def test_the_other_kernels_compile_for_the_oldest_and_the_newest_card(case):
    for capability in (80, 90):
        assert compiled_shared(*case, capability) <= SHARED[86]


@pytest.mark.parametrize("capability", [89, 90])
def test_rounding_to_eight_bits_compiles_where_they_are_multiplied(capability):
    assert compiled_shared(*FP8, capability) <= SHARED[capability]


@pytest.mark.battery
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_attention_of_other_head_sizes_compiles_and_fits(capability, head_dim):
    for case in attention_cases(divmod(capability, 10), head_dim):
        assert compiled_shared(*case, capability) <= SHARED[capability]


def test_the_table_covers_every_kernel():
    files = (attention, fp8, head, lora, nf4, norm, rope, swiglu)
    launched = {
        "_forward",
        "_backward_queries",
        "_backward_keys",
        "_backward_behind",
        *(case[0].__name__ for case in (*PLAIN, FP8)),
    }
    defined = {name for file in files for name, value in vars(file).items() if isinstance(value, triton.JITFunction)}
    helpers = "_tile _put _scores _sees _own_span _prefix_span _forward_step _queries_step _keys_step _act _shape"
    helpers += (
        " _add_block _normalise _turn _halves _weights_of _rotate_heads _rotate_heads_back _copy_heads _nf4_block"
    )
    assert defined - set(helpers.split()) == launched and torch is not None

"""Kernels in CUDA C++ compile for the cards we claim, without one."""

import pytest

from local_tinker.model.kernels import cuda, nf4_rows

pytestmark = pytest.mark.skipif(cuda.cuda_fault() is not None, reason=f"{cuda.cuda_fault()}")


@pytest.mark.parametrize("rows", nf4_rows.ROWS)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_rows_times_nf4(architecture, kind, rows):
    assert cuda.compiled("nf4_rows", architecture, **nf4_rows.constants(kind, rows)).startswith(b"\x7fELF")


def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)does not compile for sm_90.*KIND"):
        cuda.compiled("nf4_rows", "sm_90", **{**nf4_rows.constants("bf16", 4), "KIND": 1.5})

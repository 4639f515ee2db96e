"""Decoding kernels compile for every card they are meant for. No card is needed: Triton compiles for a named one."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from local_tinker.model.kernels import decode_attention, decode_begin, decode_step, dependent, draw, low_rank  # noqa: E402
from tests.model.kernels import decode_checks  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
SHARED = 99 * 1024  # bytes a program may have on the smallest of these cards (8.6, 8.9)
BATTERY = pytest.mark.battery
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled:
    """Stands in for a kernel: compiles it for one capability with the types of the call, and runs nothing."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability, self.calls = kernel, capability, 0

    def __getitem__(self, grid):
        return self.call

    def call(self, *args, num_warps=4, num_stages=3, launch_pdl=False, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [p.name for p in self.kernel.params]
        values = dict(zip(names, args, strict=False)) | constants
        signature = {name: self._type(values[name]) if name not in constants else "constexpr" for name in names}
        source = ASTSource(self.kernel, signature, {(names.index(k),): v for k, v in constants.items()})
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        built = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert f"sm_{self.capability}" in built.asm["ptx"]
        assert built.metadata.shared <= SHARED
        early = self.capability >= 90
        assert launch_pdl == early
        for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            assert (instruction in built.asm["ptx"]) == early
        self.calls += 1

    @staticmethod
    def _type(value):
        if torch.is_tensor(value):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


@pytest.mark.parametrize("capability", [80, 90, pytest.param(86, marks=BATTERY), pytest.param(89, marks=BATTERY)])
def test_every_decoding_kernel_compiles(capability, monkeypatch):
    stand_ins = []
    monkeypatch.setattr(dependent, "launches_early", lambda device: capability >= 90)
    for module in (decode_attention, decode_begin, decode_step, draw, low_rank):
        monkeypatch.setattr(module, "triton_ready", lambda device: True)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.runtime.JITFunction) and name in LAUNCHED:
                stand_ins.append(Compiled(value, capability))
                monkeypatch.setattr(module, name, stand_ins[-1])
    monkeypatch.setattr(decode_checks, "DEVICE", "cpu")
    launch_all()
    assert len(stand_ins) == len(LAUNCHED) and all(stand_in.calls for stand_in in stand_ins)


LAUNCHED = {
    "_attend_splits",
    "_combine",
    "_embed_norm",
    "_turn_angles",
    "_add_norm",
    "_rope_write",
    "_gated",
    "_add_low_rank",
    "_block_stats",
    "_pick_token",
    "_advance",
}


def launch_all():
    """Llama-3.2-3B's shapes and the settings that change a kernel's source."""
    bf16 = torch.bfloat16
    pages, rows = decode_checks.paged([70, 3], [0, 0], [100], 8)
    keys, values = (torch.zeros(pages, 8, 64, 128, dtype=bf16) for _ in range(2))
    q = torch.zeros(2, 24, 128, dtype=bf16)
    decode_attention.decode_attention(q, keys, values, rows, scale=0.1)
    _, fixed = decode_checks.paged([70, 3], [0, 0], [100], 8, fixed=True)
    decode_attention.decode_attention(q, keys, values, fixed, scale=0.1, window=50, softcap=30.0)
    _, alone = decode_checks.paged([70, 3], [-1, -1], [], 1, own_split=256)
    decode_attention.decode_attention(q, keys, values, alone, scale=0.1)
    x, residual, weight = (
        torch.zeros(2, 3100, dtype=bf16),
        torch.zeros(2, 3072, dtype=bf16),
        torch.ones(3072, dtype=bf16),
    )
    tokens, embedding = torch.zeros(2, dtype=torch.int64), torch.zeros(50, 3072, dtype=bf16)
    for factor, kind in ((None, "round_then_scale"), (55.5, "one_plus")):
        decode_begin.embed_norm(tokens, embedding, factor, weight, eps=1e-5, kind=kind)
    decode_begin.turn_angles(tokens, torch.ones(64), 1.0, bf16)
    for kind in decode_step.NORMS:
        decode_step.add_norm(x[:, :3072], residual, weight, weight, eps=1e-5, kind=kind)
    outputs = 40 * 128
    y = torch.zeros(2, outputs + 96, dtype=bf16)
    adapter = low_rank.LowRank(y[:, outputs:], torch.zeros(outputs, 32, dtype=bf16), 1.0, (0, 3072, 4096, outputs))
    norms = decode_step.HeadNorms(torch.ones(128, dtype=bf16), torch.ones(128, dtype=bf16), 1e-6, "one_plus")
    angle = torch.ones(2, 64, dtype=bf16)
    for taken, norm, turn in (
        (adapter, None, (angle, angle)),
        (None, norms, (angle.float(), angle.float())),
        (None, None, None),
    ):
        decode_step.rope_write(y, turn, keys, values, rows, heads=24, low_rank=taken, norms=norm)
    wide = torch.zeros(2, 2 * 8192 + 64, dtype=bf16)
    both = low_rank.LowRank(wide[:, 16384:], torch.zeros(16384, 32, dtype=bf16), 1.0, (0, 8192, 16384))
    for activation in decode_step.GATES:
        decode_step.gated_product(wide, 8192, activation, low_rank=both if activation == "silu" else None)
    one = low_rank.LowRank(y[:, :32], torch.zeros(3072, 32, dtype=bf16), 1.0, (0, 3072))
    low_rank.add_low_rank(x[:, :3072], one)
    low_rank.join_slices(torch.zeros(2, 2, 3104), 3072, one.up, 1.0, bf16)
    logits = torch.zeros(2, 128256)
    noise = draw.Noise(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.ones(2))
    for kept in (None, logits):
        draw.draw(logits, noise, kept=kept)
    out = draw.Output(torch.zeros(8, 2, dtype=torch.int32), torch.zeros(8, 2), torch.zeros(1, dtype=torch.int32))
    state = decode_checks.some_state(2)
    draw.advance(state, torch.zeros(2, dtype=torch.int64), torch.zeros(2), out)

"""A ragged micro-batch with something in every field, and how to run a loss of it."""

from dataclasses import dataclass, replace

import pytest
import torch

from local_tinker.losses import LOSSES, LossData, LossInputs, check_options

LENGTHS = (4, 1, 6, 3)
# Trained tokens; the third sequence has a hole (a tool's answer), the first starts with its prompt.
TRAINED = ((0, 0, 1, 1), (1,), (1, 1, 0, 0, 1, 1), (0, 1, 1))


@dataclass
class Batch:
    """Packed tensors of four sequences: two pairs, or four completions."""

    out: dict
    fields: dict
    lengths: tuple
    pairs: list

    def data(self):
        segments = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        pairs = torch.tensor(self.pairs) if self.pairs else None
        return LossData(self.fields, segments, len(self.lengths), pairs)

    def run(self, name, **options):
        """Terms and gradients by name of what a model would have made."""
        spec = LOSSES[name]
        options, _ = check_options(spec, options)
        leaves = {k: v.detach().clone().requires_grad_(k in ("logprobs", "values")) for k, v in self.out.items()}
        terms = spec.fn(LossInputs(**leaves), self.data(), **options)
        if not terms.total.requires_grad:
            return terms, {}
        used = {k: v for k, v in leaves.items() if v.requires_grad}
        grads = torch.autograd.grad(terms.total, list(used.values()), allow_unused=True)
        return terms, dict(zip(used, grads, strict=True))

    def cut(self, parts):
        """The same sequences in several micro-batches: lists of sequence indices."""
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        for part in parts:
            rows = torch.cat([torch.arange(starts[i], starts[i] + self.lengths[i]) for i in part])
            inside = {old: new for new, old in enumerate(part)}
            yield (
                replace(
                    self,
                    out={k: v[rows] for k, v in self.out.items()},
                    fields={k: v[rows] for k, v in self.fields.items()},
                    lengths=tuple(self.lengths[i] for i in part),
                    pairs=[[inside[c], inside[r]] for c, r in self.pairs if {c, r} <= set(inside)],
                ),
                rows,
            )


@pytest.fixture
def make_batch():
    def make(seed=0, dtype=torch.float64, spread=0.4):
        generator = torch.Generator().manual_seed(seed)
        n = sum(LENGTHS)

        def noise(scale=1.0):
            return (scale * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)

        sampling = -torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) * 3 - 0.1
        old = sampling + noise(spread / 4)
        out = {
            "logprobs": sampling + noise(spread),
            "entropy": noise().abs(),
            "values": noise(),
            "reference_logprobs": sampling + noise(spread),
        }
        fields = {
            "weights": torch.tensor([w for row in TRAINED for w in row], dtype=dtype),
            "logprobs": sampling,
            "old_logprobs": old,
            "advantages": noise(),
            "returns": noise(),
            "old_values": out["values"] + noise(0.3),
            "own_version": torch.ones(n, dtype=dtype),
        }
        return Batch(out, fields, LENGTHS, [[0, 1], [3, 2]])

    return make


@pytest.fixture
def batch(make_batch):
    return make_batch()

"""The plain road: transformers' own modules with PEFT's LoRA layers. The reference for the fast road, and the road of
every model the fast road does not serve.

Documents run packed in one row through our attention function where the model's attention goes through transformers'
interface and a check at construction agrees; otherwise one document a row through the model's own attention.

Shapes: N packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import MissingDependencyError, ModelError
from .agree import Seen, largest_gap, max_of, relative_gap, watch
from .attention import ATTENTION_NAME, Attend, VarlenCausal, register
from .kernels import compile_first
from .layer_parts import Pairs
from .linear import FrozenLinear, bitsandbytes
from .lora import LoraDropout, gradient_leaf
from .road import FastRoad, text_decoder

PEFT_NAME = "default"
CHECK_TOKENS = 12  # of each of the two documents of the packing check
# Largest difference of a layer between the same document packed and alone: leaks and missing masks give 0.1 and more.
CHECK_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class PlainRoad:
    """Final hidden states from the model's own modules.

    Attributes:
        packed: whether packs run as one row; where False, `reason` says why in words for the user, and `attend` must
            carry `cu_seqlens` (which rules sampling with a cache out).
    """

    name = "plain"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        _, self.decoder = text_decoder(model)
        self._adapted: dict[str, nn.Module] = {}
        self._running: _Binding | None = None
        paths = {module: path for path, module in model.named_modules()}
        self.layers = _layers(self.decoder, model.config.get_text_config().num_hidden_layers)
        for index, layer in enumerate(self.layers):
            self._recomputable(index, layer, paths[layer])
        self.packed = False
        self.reason = self._check_packing()
        self.packed = self.reason is None

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor,
        attend: Attend,
        pairs: Pairs,
        scale: float,
        levels: Sequence[str] | None = None,
        dropout: LoraDropout | None = None,
        sink: Pairs | None = None,
        rows: Tensor | None = None,
        tile: int = 0,  # noqa: ARG002  (transformers' MLP takes all rows at once)
        loras: object = None,  # noqa: ARG002  (PEFT's layers take the pairs as they are)
    ) -> Tensor:
        """As `FastRoad.hidden`. Of the levels only whether a layer is run again counts: below "norms" it is."""
        self._inject(pairs)
        again = tuple(level != "norms" for level in levels or ())
        with torch.set_grad_enabled(sink is not None):
            if sink is not None:
                pairs = {path: tuple(map(gradient_leaf, pair, sink[path])) for path, pair in pairs.items()}
            binding = _Binding(self._adapted, pairs, scale, dropout, again if sink is not None else ())
            hidden = self._documents(binding, tokens, positions, attend)
            return hidden if rows is None else hidden.index_select(0, rows)

    @torch.no_grad()
    def watched(self, tokens: Tensor, *, positions: Tensor, attend: Attend) -> Seen:
        """The base alone, with what each layer was given and made."""
        run = partial(self._run, _Binding({}, {}, 1.0, None, ()))
        if self.packed:
            return watch(self.layers, [partial(run, tokens, positions, attend=attend)])
        edges = pairwise(attend.cu_seqlens)
        return watch(self.layers, [partial(run, tokens[i:j], positions[i:j]) for i, j in edges])

    def _documents(self, binding: _Binding, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        if self.packed:
            return self._run(binding, tokens, positions, attend=attend)
        if not hasattr(attend, "cu_seqlens"):
            raise ModelError(
                f"{type(self.model).__name__} runs one document a row ({self.reason}); it cannot continue a cache"
            )
        rows = []
        for row, (i, j) in enumerate(pairwise(attend.cu_seqlens)):
            own = None if binding.dropout is None else binding.dropout.document(row)
            rows.append(self._run(replace(binding, dropout=own), tokens[i:j], positions[i:j]))
        return torch.cat(rows)

    def _run(self, binding: _Binding, tokens: Tensor, positions: Tensor, **extra: Any) -> Tensor:
        self._running = binding
        try:
            with binding.bound():
                out = self.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, **extra)
        finally:
            self._running = None
        return out.last_hidden_state[0]

    def _inject(self, pairs: Pairs) -> None:
        """Wrap every frozen projection in PEFT's LoRA layer at the first adapter; later ones share the wrappers."""
        if pairs and not self._adapted:
            self._adapted = _inject_peft(self.model)
        unknown = sorted(set(pairs) - set(self._adapted))
        if unknown:
            raise ModelError(f"{unknown[0]} is not a frozen projection of {type(self.model).__name__}")

    def _recomputable(self, index: int, layer: nn.Module, path: str) -> None:
        """Let this layer be checkpointed when a call asks. transformers' own switch would need the layer in training
        mode, and would find the adapters of a later call when it recomputes."""
        inner = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            binding = self._running
            if binding is None or not any(binding.recompute[index : index + 1]):
                return inner(*args, **kwargs)

            def again(*inputs: Any) -> Any:
                with binding.bound(within=f"{path}."):
                    return inner(*inputs, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

        layer.forward = forward

    @torch.no_grad()
    def _check_packing(self) -> str | None:
        """Switch the model to our attention if it packs documents as its own runs them alone; else say why not."""
        register()
        config = self.model.config.get_text_config()
        own = config._attn_implementation
        device = self.model.get_input_embeddings().weight.device
        tokens = torch.arange(2 * CHECK_TOKENS, device=device) * 7919 % config.vocab_size
        positions = torch.arange(CHECK_TOKENS, device=device).repeat(2)
        attend = _Recorder(VarlenCausal([0, CHECK_TOKENS, 2 * CHECK_TOKENS], device))
        base = _Binding({}, {}, 1.0, None, ())
        try:
            alone = self.watched(tokens, positions=positions, attend=attend)
            self.model.set_attn_implementation(ATTENTION_NAME)
            together = watch(self.layers, [partial(self._run, base, tokens, positions, attend=attend)], alone)
        except (ModelError, TypeError, ValueError, KeyError) as error:
            reason = str(error)
        else:
            reason = _packing_fault(alone, together, attend.windows, config)
        if reason is not None:
            self.model.set_attn_implementation(own)
        return reason


def _packing_fault(alone: Seen, together: Seen, windows: dict[int, int | None], config: Any) -> str | None:
    gap = largest_gap(together, alone)
    if not gap <= CHECK_TOLERANCE[alone.final.dtype]:
        return f"packed documents differ by {gap:.2g} from the same documents alone"
    if not windows:
        return "its attention does not go through transformers' attention interface"
    if _length_dependent(config):
        return "its rotary frequencies follow the length of a document"
    # The check is shorter than any window, so that windows are honoured is read from what the attention was given.
    expected = _expected_windows(config)
    if expected is None:
        return "its layer types are not known to pack"
    if windows != expected:
        return "its attention does not pass the windows of its config on"
    return None


def _length_dependent(config: Any) -> bool:
    """Whether transformers takes rotary frequencies from the largest position of a row, which a pack would share."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes.get("rope_type"), *(inner.get("rope_type") for inner in ropes.values() if isinstance(inner, dict))]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _expected_windows(config: Any) -> dict[int, int | None] | None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if getattr(config, "attention_chunk_size", None):
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}


class _Recorder:
    """Attends and notes the window each layer gave."""

    def __init__(self, inner: VarlenCausal) -> None:
        self.inner, self.cu_seqlens = inner, inner.cu_seqlens
        self.windows: dict[int, int | None] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.windows[layer] = options["window"]
        return self.inner(layer, q, k, v, **options)


@dataclass(frozen=True, eq=False)
class _Binding:
    """The adapter of one call: put into PEFT's layers for its forward, and again for a layer recomputed in backward."""

    adapted: dict[str, nn.Module]
    pairs: Pairs
    scale: float
    dropout: LoraDropout | None
    recompute: tuple[bool, ...]  # a layer; empty: none

    @contextmanager
    def bound(self, within: str = "") -> Iterator[None]:
        """For the modules whose path starts with `within`."""
        adapted = {path: layer for path, layer in self.adapted.items() if path.startswith(within)}
        before = {path: layer.lora_dropout[PEFT_NAME].held for path, layer in adapted.items()}
        try:
            for path, layer in adapted.items():
                _hold(layer, (self.pairs.get(path), self.scale, self.dropout))
            yield
        finally:
            for path, layer in adapted.items():
                _hold(layer, before[path])


class _Held(nn.Module):
    """Stands where PEFT has its dropout module: our replayable mask, and the place of what the layer holds now."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.held: tuple[Any, float, LoraDropout | None] = (None, 1.0, None)

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.held[2]
        return x if dropout is None else dropout(x, self.path)


def _hold(layer: nn.Module, held: tuple[Any, float, LoraDropout | None]) -> None:
    """Give one PEFT layer its (A, B), scale and dropout, or turn it off where there is no pair."""
    pair, scale, _ = held
    layer.lora_dropout[PEFT_NAME].held = held
    layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight = pair if pair is not None else (None, None)
    layer.scaling[PEFT_NAME] = scale
    layer.enable_adapters(pair is not None)


def _inject_peft(model: nn.Module) -> dict[str, nn.Module]:
    """Wrap every `FrozenLinear`; returns PEFT's layers by the path of what they wrap."""
    try:
        bitsandbytes()  # PEFT imports it where it is installed; ours keeps it from asking a hub for kernels
    except MissingDependencyError:
        pass
    from peft import LoraConfig, inject_adapter_in_model

    paths = [path for path, module in model.named_modules() if isinstance(module, FrozenLinear)]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=paths)
    inject_adapter_in_model(config, model, PEFT_NAME, low_cpu_mem_usage=True)
    adapted = {path: model.get_submodule(path) for path in paths}
    for path, layer in adapted.items():
        layer.lora_dropout[PEFT_NAME] = _Held(path)
        # PEFT's own parameters go: a call's tensors take their place as plain attributes, with gradients to the caller.
        del layer.lora_A[PEFT_NAME].weight, layer.lora_B[PEFT_NAME].weight
        layer.enable_adapters(False)
    model.requires_grad_(False)
    return adapted


def _layers(decoder: nn.Module, count: int) -> nn.ModuleList:
    """The list of decoder layers, whatever its name."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(decoder).__name__} holds no list of {count} layers")


@torch.no_grad()
def probe(fast: FastRoad, plain: PlainRoad, tokens: Tensor, *, tolerance: float) -> tuple[bool, float]:
    """Run tokens (N,) as two packed documents on both roads: do all parts agree within `tolerance`, and the largest gap.

    Whole passes are compared too, for what lies between the layers; rounding may take them ten times as far apart.
    """
    edges = [0, tokens.shape[0] * 5 // 8, tokens.shape[0]]
    positions = torch.cat([torch.arange(j - i, device=tokens.device) for i, j in pairwise(edges)])
    call = dict(positions=positions, attend=VarlenCausal(edges, tokens.device))
    theirs = plain.watched(tokens, **call)
    compile_first(lambda: fast.watched(tokens, theirs, **call), tokens.device)
    gap = largest_gap(fast.watched(tokens, theirs, **call), theirs)
    whole = relative_gap(fast.hidden(tokens, **call, pairs={}, scale=1.0), theirs.final)
    largest = max_of(gap, whole / 10)
    return largest <= tolerance, largest

"""Hidden states parked in pinned host memory between a layer's forward and its backward.

Copies run on a stream of their own, so they hide behind the layers' products. torch's host allocator keeps pinned blocks
for the next micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Parked:
    """One tensor on its way to the host, there, or on its way back. On a CPU it simply stays.

    Args:
        tensor: may be written to again once the device's current stream has passed this point.
        stream: for the copies; None leaves the tensor where it is.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._back: Tensor | None = None
        if stream is None:
            self._host = tensor
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self._device = tensor.device
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start the way back; the next `get` waits for it, on the device."""
        if self._stream is None or self._back is not None:
            return
        with torch.cuda.stream(self._stream):
            self._back = self._host.to(self._device, non_blocking=True)

    def get(self) -> Tensor:
        if self._stream is None:
            return self._host
        self.fetch()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        self._back.record_stream(current)
        return self._back

"""Hidden states parked in pinned host memory between a layer's forward and its backward.

Copies run on a stream of their own, so they hide behind the layers' products. Device memory is taken and given back on
the stream that computes, which waits for a copy before it goes on to use that memory: torch's allocator then hands it on
at once, where a block that several streams use would be missing until the host sees the copy's event, and the host is
many layers ahead. torch's host allocator keeps pinned blocks for the next micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Parked:
    """One tensor on its way to the host, there, or on its way back. On a CPU it simply stays.

    Whoever abandons the pass must let the current stream wait for `stream`, since a copy may still be writing to memory
    that is free by then.

    Args:
        tensor: must not be written to before `leave`.
        stream: for the copies; None leaves the tensor where it is.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._here: Tensor | None = tensor
        self._stream = stream
        if stream is None:
            return
        self._device = tensor.device
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copied = self._copy(tensor, self._host)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def leave(self) -> None:
        """Give the device memory back; what the current stream does from here on waits for the copy."""
        if self._stream is not None:
            self._wait()
            self._here = None

    def fetch(self) -> None:
        """Start the way back; the next `get` waits for it, on the device."""
        if self._here is None:
            self._here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._copied = self._copy(self._host, self._here)

    def get(self) -> Tensor:
        self.fetch()
        if self._stream is not None:
            self._wait()
        return self._here

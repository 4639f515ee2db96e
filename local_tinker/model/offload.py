"""Hidden states parked in pinned host memory between a layer's forward and its backward.

Copies run on a stream of their own, so they hide behind the layers' products. Device memory is taken and given back on
the stream that computes, which waits for a copy before it goes on to use that memory: torch's allocator then hands it on
at once, where a block that several streams use would be missing until the host sees the copy's event, and the host is
many layers ahead.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .kernels import power_of_two


class Parking:
    """The stream that copies, and the pinned buffers in which nothing is parked.

    A buffer is free for the next state as soon as the way back of the last one is queued, since all copies keep the order
    of one stream. torch's allocator of pinned memory would keep it until the host sees the copy's end, and the host is a
    micro-batch ahead: it would pin up to twice the memory, and pinning takes milliseconds.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """A buffer of so many bytes or more. One that never comes back is torch's again."""
        fitting = [at for at, buffer in enumerate(self._free) if buffer.numel() >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda at: self._free[at].numel()))
        return torch.empty(power_of_two(nbytes), dtype=torch.uint8, pin_memory=True)

    def give(self, buffer: Tensor) -> None:
        self._free.append(buffer)


@cache
def parking_beside(device: torch.device) -> Parking:
    """The device's one, kept from pass to pass."""
    return Parking(torch.cuda.Stream(device))


class Parked:
    """One tensor on its way to the host, there, or on its way back. On a CPU it simply stays.

    Whoever abandons the pass must let the current stream wait for the parking's, since a copy may still be writing to
    memory that is free by then.

    Args:
        tensor: must not be written to before `leave`.
        parking: None leaves the tensor where it is.
    """

    def __init__(self, tensor: Tensor, parking: Parking | None) -> None:
        self._here: Tensor | None = tensor
        self._parking = parking
        if parking is None:
            return
        self._device, self._shape, self._dtype = tensor.device, tensor.shape, tensor.dtype
        self._buffer: Tensor | None = parking.take(tensor.nbytes)
        self._copied = self._copy(tensor, self._host())

    def _host(self) -> Tensor:
        size = self._shape.numel() * self._dtype.itemsize
        return self._buffer[:size].view(self._dtype).view(self._shape)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        stream = self._parking.stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def leave(self) -> None:
        """Give the device memory back; what the current stream does from here on waits for the copy."""
        if self._parking is not None:
            self._wait()
            self._here = None

    def fetch(self) -> None:
        """Start the way back; the next `get` waits for it, on the device."""
        if self._here is None:
            self._here = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(self._host(), self._here)
            self._parking.give(self._buffer)
            self._buffer = None

    def get(self) -> Tensor:
        self.fetch()
        if self._parking is not None:
            self._wait()
        return self._here

"""CUDA C++ beside these files, compiled by NVRTC when it is first needed: for what Triton has no words for, which is
shared memory that a kernel lays out itself.

Compiler and driver are called through cuda-bindings, NVIDIA's own package, which torch brings along on cards.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from cuda.bindings import driver, nvrtc
except ImportError:  # no such card here
    driver = nvrtc = None

_INT = ctypes.c_int


@cache
def cuda_fault() -> str | None:
    """Why CUDA C++ cannot be compiled, in words for the user; None where it can."""
    if nvrtc is None:
        return "the package cuda-bindings did not import"
    try:
        _checked(nvrtc.nvrtcVersion())
    except RuntimeError as error:  # the bindings are there, the library is not
        return f"NVRTC did not load: {error}"
    return None


@cache
def driver_version() -> int:
    """12030 for 12.3; 0 where nobody can say."""
    return 0 if driver is None else _checked(driver.cuDriverGetVersion())


def compiled(name: str, architecture: str, **constants: int | str) -> bytes:
    """The machine code of `name`.cu for "sm_90" or another, with these macros.

    Raises:
        RuntimeError: it does not compile; the text is the compiler's.
    """
    source = Path(__file__).with_name(f"{name}.cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], []))
    macros = [f"-D{key}={_quoted(value)}".encode() for key, value in constants.items()]
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", *macros]
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            said = log.decode(errors="replace").rstrip(" \0\n")
            raise RuntimeError(f"{name}.cu does not compile for {architecture}:\n{said}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


class CudaKernel:
    """One instance of a kernel on one card.

    Args:
        threads: of a program.
        constants: macros of the source.
    """

    def __init__(self, name: str, device: int, threads: int, **constants: int | str) -> None:
        self._device, self._threads = device, threads
        major, minor = torch.cuda.get_device_capability(device)
        code = compiled(name, f"sm_{major}{minor}", **constants)
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes the card's context this thread's
            self._module = _checked(driver.cuModuleLoadData(code))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))

    @property
    def resident(self) -> int:
        """Programs that run on a multiprocessor at once."""
        return _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, self._threads, 0))

    def launch(self, programs: int, *args: Tensor | int | None, dependent: bool = False) -> None:
        """On the current stream of the kernel's card. Tensors go as their addresses, None as no address, integers as 32
        bits.

        Args:
            dependent: it may begin before the kernel ahead of it has ended, see dependent.py.
        """
        values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args)
        types = tuple(_INT if type(arg) is int else ctypes.c_void_p for arg in args)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX = programs, self._threads
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        if dependent:
            config.attrs, config.numAttrs = [_early()], 1
        _checked(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


@cache
def _early() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _quoted(value: int | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _checked(result: tuple) -> Any:
    """What a call gave after its error code."""
    error, *found = result
    if int(error) != 0:
        raise RuntimeError(f"{type(error).__name__} {error.name}")
    return found[0] if len(found) == 1 else tuple(found) if found else None

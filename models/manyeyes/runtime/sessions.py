"""ONNX Runtime sessions: which provider runs a graph, with how many threads, and where tensors stay.

It also says how much memory a bundle may take.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from manyeyes.errors import BundleError, did_you_mean

_SHARE = 0.9
# Memory that a container may use: cgroup v2, then v1. No limit reads "max", or as a number beyond any machine.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def memory_limit() -> int:
    """Bytes: nine tenths of what the machine has, or of what its container may use where that is less."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows does not tell so
        limits = [2**62]
    for name in _CONTAINER_LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return int(_SHARE * min(limits))


CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# Bytes of one constant that any graph may compute while it loads, however small its file.
_MOST_FOLDED = 2**24

# ONNX Runtime raises one class a status code, and they share no base but Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
# A run with bound inputs reports all of them as RuntimeError.
_RUN_ERRORS: tuple[type[Exception], ...] = (*_ORT_ERRORS, RuntimeError)


def choose_providers(providers: Sequence[str] | None = None) -> list[str]:
    """Names of the execution providers to ask for, best first.

    Args:
        providers: What the user wants; by default CUDA where a CUDA device is there, and the CPU.

    Raises:
        BundleError: This build of ONNX Runtime does not know a provider.
    """
    available = ort.get_available_providers()
    if providers is None:
        return [CUDA, CPU] if count_cuda_devices() else [CPU]
    if not providers:
        raise BundleError("no execution provider is named", "at least one is needed", f"For instance {CPU}.")
    for name in providers:
        if name not in available:
            raise BundleError(
                f'execution provider is "{name}"',
                f"this ONNX Runtime has {', '.join(available)}",
                f"{did_you_mean(name, available)}Leave it out to have one chosen.",
            )
    return list(providers)


def choose_threads(threads: int | None = None) -> int:
    """Threads a session may use: ``threads``, else ``MANYEYES_THREADS``, else 0 (ONNX Runtime takes every core).

    Raises:
        BundleError: Not a whole number of at least 0.
    """
    value = str(threads) if threads is not None else os.environ.get("MANYEYES_THREADS") or "0"
    if not value.isdecimal():
        raise BundleError(
            f"number of threads is {value!r}", "a whole number of at least 0 is needed", "Fix MANYEYES_THREADS."
        )
    return int(value)


def choose_prefill(prefill: bool | None = None) -> bool:
    """Whether a graph for given tokens is loaded too: ``prefill``, else what ``MANYEYES_PREFILL`` says, else yes.

    Raises:
        BundleError: ``MANYEYES_PREFILL`` is neither 0 nor 1.
    """
    value = os.environ.get("MANYEYES_PREFILL") or "1"
    if value not in ("0", "1"):
        raise BundleError(f"MANYEYES_PREFILL is {value!r}", "0 or 1 is needed", "Fix MANYEYES_PREFILL.")
    return value == "1" if prefill is None else prefill


def open_session(graph: Path, *, providers: Sequence[str], threads: int) -> ort.InferenceSession:
    """Load one graph.

    Args:
        graph: The ``.onnx`` file.
        providers: From ``choose_providers``.
        threads: From ``choose_threads``.

    Raises:
        BundleError: The graph does not load or takes more memory than ``memory_limit``, or the first provider does not
            start.
    """
    _limit_memory()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # One arena for all graphs of a process, which ends at the limit.
    options.add_session_config_entry("session.use_env_allocators", "1")
    # What is computed while a graph loads lies outside the arena. It is made of the graph's weights, so that none of it
    # need be larger than the file.
    folded = max(_MOST_FOLDED, graph.stat().st_size if graph.is_file() else 0)
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(folded))
    # The graphs of a bundle take turns; a thread pool that spins while it waits takes the cores from the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # TF32 keeps 10 bits of a product's mantissa; a bundle's answers are to be those of fp32 torch.
    chosen = [(name, {"use_tf32": "0"} if name == CUDA else {}) for name in providers]
    try:
        session = ort.InferenceSession(str(graph), sess_options=options, providers=chosen)
    except _ORT_ERRORS as error:
        raise BundleError(
            f"{graph.name} does not load ({error})", "a graph that ONNX Runtime can run is needed", "Export it again."
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise BundleError(
            f"{graph.name} runs on {session.get_providers()[0]}",
            f"{providers[0]} did not start",
            f"Install its libraries (for CUDA: pip install manyeyes[gpu]) or ask for {CPU}.",
        )
    return session


@cache
def _limit_memory() -> None:
    """Let all graphs of this process together take ``memory_limit`` of host memory: a small file may ask for all."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    defaults = (-1, -1, -1)  # how it grows, its first chunk, when a chunk is split
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(memory_limit(), *defaults))


class Graph:
    """One loaded graph that can leave outputs where it computed them.

    Args:
        path: The ``.onnx`` file.
        providers: From ``choose_providers``.
        threads: From ``choose_threads``.

    Raises:
        BundleError: As ``open_session``.
    """

    def __init__(self, path: Path, *, providers: Sequence[str], threads: int) -> None:
        self.name = path.name
        self._session = open_session(path, providers=providers, threads=threads)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self.properties: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.device = "cuda" if self.providers[0] == CUDA else "cpu"
        self.input_names: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())
        self._shapes = {
            value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())
        }

    def shape(self, name: str, *, rank: int) -> list[int | str | None]:
        """Shape of an input or output; a dynamic axis is a text or None.

        Args:
            name: Of the input or output.
            rank: Axes that it is to have.

        Raises:
            BundleError: There is none of that name, or it has another number of axes.
        """
        shape = self._shapes.get(name)
        if shape is None or len(shape) != rank:
            raise BundleError(
                f"{self.name} has {f'{name} of shape {shape}' if shape is not None else f'no {name}'}",
                f"{name} with {rank} axes is needed",
                "Export the bundle again.",
            )
        return list(shape)

    def sizes(self, name: str, *, rank: int, fixed: Sequence[int]) -> list[int]:
        """Sizes of axes that do not change.

        Args:
            name: Of the input or output.
            rank: Axes that it is to have.
            fixed: Places of the axes.

        Raises:
            BundleError: As ``shape``, or one of the axes is dynamic.
        """
        shape = self.shape(name, rank=rank)
        sizes = [size for size in (shape[place] for place in fixed) if isinstance(size, int)]
        if len(sizes) != len(fixed):
            raise BundleError(
                f"{self.name} has {name} of shape {shape}",
                f"axes {', '.join(map(str, fixed))} of a fixed size are needed",
                "Export the bundle again.",
            )
        return sizes

    def to_device(self, array: NDArray[Any]) -> ort.OrtValue:
        """Put an array where the graph computes; on the CPU nothing is copied."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any] | ort.OrtValue],
        *,
        on_host: Sequence[str],
        into: Mapping[str, ort.OrtValue] | None = None,
    ) -> dict[str, ort.OrtValue]:
        """Run the graph.

        Args:
            inputs: Every input by name.
            on_host: Outputs to bring to host memory; the others stay on the device.
            into: Memory that outputs are written to, by name; the others get new memory.

        Raises:
            BundleError: An input does not fit the graph.
        """
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self.to_device(value) if isinstance(value, np.ndarray) else value)
        for name in self.output_names:
            if into and name in into:
                binding.bind_ortvalue_output(name, into[name])
            else:
                binding.bind_output(name, "cpu" if name in on_host else self.device, 0)
        try:
            self._session.run_with_iobinding(binding)
        except _RUN_ERRORS as error:
            raise BundleError(
                f"{self.name} fails ({error})",
                "inputs that fit the graph, and memory for them, are needed",
                "Ask for smaller batches, or export the bundle again.",
            ) from error
        return dict(zip(self.output_names, binding.get_outputs(), strict=True))


def count_cuda_devices() -> int:
    """CUDA devices that this ONNX Runtime can use; ``CUDA_VISIBLE_DEVICES`` hides the others."""
    if CUDA not in ort.get_available_providers():
        return 0
    # ONNX Runtime's CUDA build lists its provider on machines without a GPU too, and prints an error when it is asked
    # for there. The driver knows better.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    counted = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if counted else 0

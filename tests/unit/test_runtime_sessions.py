from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from manyeyes.errors import BundleError
from manyeyes.runtime import sessions
from manyeyes.runtime.sessions import CPU, CUDA, Graph, choose_providers, choose_threads


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    """A graph that adds two rows of numbers and keeps the sum twice."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows"]) for name in ("a", "b")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows"]) for name in ("sum", "again")]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Add", ["a", "b"], ["again"])]
    model = helper.make_model(helper.make_graph(nodes, "adder", inputs, outputs), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, tmp_path / "adder.onnx")
    return tmp_path / "adder.onnx"


def has_cuda_device() -> bool:
    return sessions.count_cuda_devices() > 0


class FakeDriver:
    """As much of the CUDA driver as is asked for."""

    def __init__(self, status: int, devices: int) -> None:
        self.status, self.devices = status, devices

    def cuInit(self, _flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self.devices  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(
    ("built_with", "status", "devices", "chosen"),
    [
        ([CUDA, CPU], 0, 1, [CUDA, CPU]),
        ([CUDA, CPU], 0, 0, [CPU]),
        ([CUDA, CPU], 100, 1, [CPU]),
        ([CPU], 0, 1, [CPU]),
    ],
)
def test_cuda_is_chosen_only_where_runtime_and_device_are_there(
    monkeypatch: pytest.MonkeyPatch, built_with: list[str], status: int, devices: int, chosen: list[str]
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: built_with)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: FakeDriver(status, devices))
    assert choose_providers() == chosen


def test_a_machine_without_a_driver_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert choose_providers() == [CPU]


def test_unknown_provider_names_the_nearest() -> None:
    with pytest.raises(BundleError, match='Did you mean "CPUExecutionProvider"'):
        choose_providers(["CPUExecutionProvide"])
    with pytest.raises(BundleError, match="at least one"):
        choose_providers([])


@pytest.mark.skipif(has_cuda_device(), reason="CUDA does start here")
def test_provider_that_does_not_start_is_an_error_and_no_silent_fallback(adder: Path) -> None:
    with pytest.raises(BundleError, match=CUDA):
        Graph(adder, providers=choose_providers([CUDA]), threads=1)


def test_graph_says_what_runs_it(adder: Path) -> None:
    graph = Graph(adder, providers=[CPU], threads=1)
    assert graph.providers == (CPU,)
    assert (graph.input_names, graph.output_names) == (("a", "b"), ("sum", "again"))
    assert graph.shape("a", rank=1) == ["rows"]
    for name, rank in (("a", 2), ("c", 1)):
        with pytest.raises(BundleError, match=f"{name} with {rank} axes"):
            graph.shape(name, rank=rank)
    with pytest.raises(BundleError, match="fixed size"):
        graph.sizes("a", rank=1, fixed=(0,))


def test_outputs_on_the_device_go_back_in(adder: Path) -> None:
    graph = Graph(adder, providers=[CPU], threads=1)
    first = graph.run({"a": np.ones(3, np.float32), "b": np.full(3, 2, np.float32)}, on_host=["again"])
    second = graph.run({"a": first["sum"], "b": np.arange(3, dtype=np.float32)}, on_host=["sum", "again"])
    np.testing.assert_array_equal(second["sum"].numpy(), [3, 4, 5])


def test_views_and_empty_arrays_go_in(adder: Path) -> None:
    graph = Graph(adder, providers=[CPU], threads=1)
    strided = np.arange(6, dtype=np.float32)[::2]
    np.testing.assert_array_equal(graph.run({"a": strided, "b": strided}, on_host=["sum"])["sum"].numpy(), [0, 4, 8])
    empty = np.zeros(0, np.float32)
    assert graph.run({"a": empty, "b": empty}, on_host=["sum"])["sum"].numpy().shape == (0,)


def test_inputs_that_do_not_fit_are_refused(adder: Path) -> None:
    graph = Graph(adder, providers=[CPU], threads=1)
    with pytest.raises(BundleError, match=r"adder\.onnx fails"):
        graph.run({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, on_host=["sum"])


def test_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"broken\.onnx does not load"):
        Graph(tmp_path / "broken.onnx", providers=[CPU], threads=1)


def test_threads_come_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANYEYES_THREADS", raising=False)
    assert choose_threads() == 0
    monkeypatch.setenv("MANYEYES_THREADS", "3")
    assert choose_threads() == 3
    assert choose_threads(1) == 1
    monkeypatch.setenv("MANYEYES_THREADS", "many")
    with pytest.raises(BundleError, match="'many'"):
        choose_threads()

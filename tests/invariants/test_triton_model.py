"""The model that Triton runs answers as the bundle does; a stand-in for Triton's module takes what it sends."""

from __future__ import annotations

import importlib.util
import queue
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes.runtime.bundle import Bundle
from manyeyes.serving.handoff import write_triton
from tests.export_toys import Toy, picture


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> Any:
        return self.values


class Response:
    def __init__(self, tensors: list[Tensor], error: Any = None) -> None:
        self.tensors, self.error = tensors, error


class Request:
    """Is its own sender."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = {name: Tensor(name, values) for name, values in inputs.items()}
        self.sent: queue.SimpleQueue[tuple[Response, int]] = queue.SimpleQueue()

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: Response, *, flags: int) -> None:
        self.sent.put((response, flags))

    def text(self) -> str:
        text = ""
        while True:
            response, final = self.sent.get(timeout=60)
            text += str(response.error) if response.error else response.tensors[0].values[0].decode()
            if final:
                return text


def test_repository_answers_as_the_bundle_does(
    toy_bundle: Toy, loaded_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in: Any = types.ModuleType("triton_python_backend_utils")
    stand_in.Tensor, stand_in.InferenceResponse, stand_in.TritonError = Tensor, Response, str
    stand_in.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    stand_in.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_triton(toy_bundle.bundle, tmp_path / "repository", name="toy")
    version = tmp_path / "repository" / "toy" / "1"
    assert 'backend: "python"' in (version.parent / "config.pbtxt").read_text(encoding="utf-8")
    assert (version / "code" / "manyeyes" / "runtime" / "engine.py").is_file()
    spec = importlib.util.spec_from_file_location("toy_model", version / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({})
    images = [picture(0), picture(1)]
    requests = [
        Request(question=np.array([b"red?"], object), max_tokens=np.array([9])),
        Request(question=np.array([b"both?"], object), images=np.array(images, object), max_tokens=np.array([9])),
        Request(question=np.array([b"bad?"], object), images=np.array([b"no image"], object)),
        Request(),
    ]
    model.execute(requests)
    texts = [request.text() for request in requests]
    model.finalize()
    assert texts[0] == loaded_bundle.answer("red?", max_new_tokens=9)
    assert texts[1] == loaded_bundle.answer("both?", images=images, max_new_tokens=9)
    assert "image" in texts[2]
    assert texts[3]

"""Triton's Python back end around a bundle: ``manyeyes handoff --to triton`` copies this file beside the bundle.

It needs ``triton_python_backend_utils``, which is there when Triton runs it, and ``manyeyes.runtime``, a copy of which
lies beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).parent
if (HERE / "code").is_dir():
    sys.path.insert(0, str(HERE / "code"))


class TritonPythonModel:
    """Answers many requests at once; each piece of an answer is one response (decoupled)."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the bundle."""
        del args
        from manyeyes.runtime.bundle import load_bundle
        from manyeyes.runtime.engine import Engine

        self.engine = Engine(load_bundle(HERE / "bundle"))

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand requests to the engine, which answers in its own time."""
        from manyeyes.errors import ManyEyesError
        from manyeyes.runtime.engine import Chat

        for request in requests:
            sender = request.get_response_sender()
            limit = _value(request, "max_tokens")
            try:
                chat = Chat.ask(
                    _value(request, "question")[0].decode(),
                    images=[bytes(image) for image in _value(request, "images")],
                    max_new_tokens=int(limit[0]) if len(limit) else 256,
                )
                self.engine.submit(chat, _deliver_to(sender))
            except (ManyEyesError, IndexError, UnicodeDecodeError) as error:
                _refuse(sender, error)

    def finalize(self) -> None:
        """Finish what was begun."""
        self.engine.close()


def _deliver_to(sender: Any) -> Callable[[Any], None]:
    def deliver(piece: Any) -> None:
        if isinstance(piece, Exception):
            _refuse(sender, piece)
            return
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if piece.finish is not None else 0
        text = pb_utils.Tensor("text", np.array([piece.text.encode()], dtype=object))
        sender.send(pb_utils.InferenceResponse([text]), flags=final)

    return deliver


def _refuse(sender: Any, error: Exception) -> None:
    response = pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error)))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _value(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else tensor.as_numpy()

"""One side of ``bench.peers``: a model in a process of its own that answers lists of questions.

``python bench/peers_worker.py SIDE``; lmms-eval's side runs under a Python of its own and imports nothing of ManyEyes.
One JSON object a line: standard input first names the ``checkpoint``, standard output answers with ``versions``. Then
each line in holds ``requests`` (image file and prompt of each), ``max_new_tokens`` and ``batch_size`` (images), and
each line out ``answers``, ``cpu_s``, ``wall_s`` and ``peak_rss_mib``. Loading is not in the seconds; reading an image
file's bytes is not either, decoding and preparing it is.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

Requests = Sequence[tuple[bytes, str]]
Answer = Callable[[Requests, int, int], list[str]]

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
)
"""LLaVA-1.5's, as lmms-eval's ``llava_hf`` writes it for a checkpoint without a chat template."""


def lmms_eval(checkpoint: str) -> Answer:
    """``llava_hf`` of lmms-eval: its request list to its answers."""
    from PIL import Image

    new_request = import_module("lmms_eval.api.instance").Instance
    load_model = import_module("lmms_eval.models.simple.llava_hf").LlavaHf

    # transformers 5 refuses the empty device map that is lmms-eval's default.
    model = load_model(pretrained=checkpoint, device="cpu", device_map="cpu", dtype="float32", batch_size=1)

    def show(data: bytes) -> list[Any]:
        return [Image.open(io.BytesIO(data)).convert("RGB")]

    def answer(requests: Requests, max_new_tokens: int, batch_size: int) -> list[str]:  # noqa: ARG001
        model.task_dict = {"peers": {"test": [image for image, _ in requests]}}
        instances = [
            new_request(
                request_type="generate_until",
                arguments=(prompt, {"max_new_tokens": max_new_tokens}, show, number, "peers", "test"),
                idx=0,
                metadata={"task": "peers", "doc_id": number, "repeats": 1},
            )
            for number, (_, prompt) in enumerate(requests)
        ]
        return list(model.generate_until(instances))

    return answer


def generate(checkpoint: str) -> Answer:
    """Transformers' processor and ``generate``, a question at a time."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(requests: Requests, max_new_tokens: int, batch_size: int) -> list[str]:  # noqa: ARG001
        answers = []
        for image, question in requests:
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            inputs = processor(images=picture, text=PROMPT.format(question=question), return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            answers.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return answers

    return answer


def torch_answerer(checkpoint: str) -> Answer:
    """Ours in PyTorch, without a cache that outlives a call."""
    from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer

    return _grouped(TorchAnswerer(Path(checkpoint), threads=1, device="cpu"))


def bundle_answerer(checkpoint: str) -> Answer:
    """Our ONNX bundle, without a cache that outlives a call."""
    from manyeyes.evaluation.answering.answerers import BundleAnswerer

    return _grouped(BundleAnswerer(Path(checkpoint), threads=1, device="cpu"))


def _grouped(answerer: Any) -> Answer:
    from manyeyes.runtime import Group

    def answer(requests: Requests, max_new_tokens: int, batch_size: int) -> list[str]:
        # As evaluate plans its batches: the questions of an image together, this many images at once.
        by_image: dict[bytes, list[int]] = {}
        for number, (image, _) in enumerate(requests):
            by_image.setdefault(image, []).append(number)
        images = list(by_image)
        answers = [""] * len(requests)
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            groups = [
                Group(images=(image,), questions=tuple(requests[number][1] for number in by_image[image]))
                for image in batch
            ]
            found = answerer.answer_groups(groups, max_new_tokens=max_new_tokens)
            for image, own in zip(batch, found, strict=True):
                for number, written in zip(by_image[image], own, strict=True):
                    answers[number] = written.text
        return answers

    return answer


SIDES: dict[str, tuple[Callable[[str], Answer], tuple[str, ...]]] = {
    "lmms-eval": (lmms_eval, ("lmms_eval", "transformers", "torch")),
    "generate": (generate, ("transformers", "torch")),
    "manyeyes": (torch_answerer, ("manyeyes", "transformers", "torch")),
    "bundle": (bundle_answerer, ("manyeyes", "onnxruntime")),
}
"""How each side loads its model, and the modules whose versions it names."""


def peak_rss_mib() -> float:
    """Most memory that this process held; getrusage's figure begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Serve until standard input ends."""
    # Whatever the libraries print must not stand between the answers.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    build, modules = SIDES[sys.argv[1]]
    if sys.argv[1] != "bundle":
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
    answer = build(json.loads(sys.stdin.readline())["checkpoint"])
    # onnxruntime comes as onnxruntime-gpu too; an editable install has no list of its modules.
    owners = packages_distributions()
    versions = {name: version(owners.get(name, [name])[0]) for name in modules}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        requests = [(Path(file).read_bytes(), prompt) for file, prompt in call["requests"]]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        answers = answer(requests, call["max_new_tokens"], call["batch_size"])
        result = {
            "answers": answers,
            "cpu_s": time.process_time() - cpu_s,
            "wall_s": time.perf_counter() - wall_s,
            "peak_rss_mib": peak_rss_mib(),
        }
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()

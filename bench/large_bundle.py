"""A decoder of more than 2 GiB, through everything: ``python -m bench.large_bundle``.

More than 2 GiB is what protobuf takes in one file. A model with random weights and few, wide layers is saved, exported,
registered, pulled with its checksums and opened by the runtime, which must give torch's tokens and logits. No file of
the bundle may be larger than 2 GiB, and no weight may be turned or converted while the graph runs: ONNX Runtime folds
constants of a graph with weights beside it up to a size. Needs 9 GB of memory and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import onnx

from manyeyes.export.bundle import export_bundle
from manyeyes.export.parity import measure_parity
from manyeyes.model import save_checkpoint
from manyeyes.recipe import load_recipe
from manyeyes.registry.pull import pull
from manyeyes.registry.tracking import connect
from manyeyes.runtime.bundle_contents import DECODER, read_manifest
from tests.export_toys import MD5, make_groups, make_model

NAME = "large"
LIMIT = 2**31
MOST_LOGIT = 1e-4
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
}


@contextmanager
def timed(name: str, found: dict[str, float]) -> Iterator[None]:
    """Note the CPU seconds of what runs inside; say what ran and the most memory so far."""
    started = time.process_time()
    yield
    gc.collect()
    found[name] = round(time.process_time() - started, 1)
    print(f"{name}: {found[name]} CPU s, at most {peak_gb()} GB so far", flush=True)


def peak_gb() -> float:
    """Most memory that this process had."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def find_changed_weights(graph: Path) -> list[str]:
    """What reads a weight of a million numbers and is no product: it would run at every step."""
    proto = onnx.load(graph, load_external_data=False).graph
    weights = {tensor.name for tensor in proto.initializer if prod(tensor.dims) > 10**6}
    return [node.op_type for node in proto.node if node.op_type != "MatMul" and weights.intersection(node.input)]


def main() -> int:
    """Run it and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/large_bundle.json"))
    out = parser.parse_args().out
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="manyeyes-large-") as name:
        folder = Path(name)
        os.environ.update(MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}", MANYEYES_CACHE=str(folder / "cache"))
        checkpoint, version = folder / "checkpoint", folder / "1"
        exported = version / "artifacts" / "bundle"
        with timed("make", seconds):
            save_checkpoint(*make_model(text=WIDE), checkpoint)
        with timed("export", seconds):
            export_bundle(checkpoint, exported, recipe=load_recipe("tiny"), data_md5=MD5, code_digest="c" * 64)
        sizes = {
            file: entry["bytes"] for file, entry in read_manifest(exported)["files"].items() if file.startswith(DECODER)
        }
        assert sum(sizes.values()) > LIMIT >= max(sizes.values()), sizes
        changed = find_changed_weights(exported / DECODER)
        assert not changed, changed
        with timed("pull", seconds):
            client = connect(create=True).client
            client.create_registered_model(NAME)
            tags = {"bundle_digest": str(read_manifest(exported)["digest"])}
            client.create_model_version(NAME, source=version.as_uri(), tags=tags)
            pulled = pull(NAME, 1, folder / "pulled")
        with timed("open and compare with torch", seconds):
            parity = measure_parity(checkpoint, pulled, make_groups(), items=6, max_new_tokens=8)
    result = {
        "decoder_files": sizes,
        "items": parity.items,
        "token_match": parity.token_match,
        "max_abs_logit": parity.max_abs_logit,
        "cpu_s": seconds,
        "peak_rss_gb": peak_gb(),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if parity.token_match == 1 and parity.max_abs_logit < MOST_LOGIT else 1


if __name__ == "__main__":
    raise SystemExit(main())

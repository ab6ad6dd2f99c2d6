"""A peer's scores of single answers, run by the Python that has it: ``scorers_worker.py MODULE``.

``MODULE`` beside this file has ``scores``. One JSON object a line on standard input,
``{"benchmark": ..., "items": [[row, answer], ...]}``; a list of scores a line on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module


def main() -> None:
    """Serve until standard input ends."""
    # What peers print must not come between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer = import_module(sys.argv[1])
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(peer.scores(call["benchmark"], call["items"])), file=out, flush=True)


if __name__ == "__main__":
    main()

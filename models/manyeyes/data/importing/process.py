"""One of several importing processes: ``python -m manyeyes.data.importing.process DESCRIPTOR``."""

from __future__ import annotations

import sys

from manyeyes.children import child_connection, telling_why
from manyeyes.data.importing.work import UnitWorker


def main() -> None:
    """Take a job, then its units as they come."""
    connection = child_connection(int(sys.argv[1]))
    with telling_why(connection):
        worker = UnitWorker(connection.recv())
        while True:
            try:
                number, unit = connection.recv()
            except EOFError:
                return
            connection.send(("done", number, worker.run(number, unit)))


if __name__ == "__main__":
    main()

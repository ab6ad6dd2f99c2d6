"""Import: what lies on somebody's disk or in a bucket becomes a data set of a snapshot.

``KINDS`` are the formats that are read; ``import_data`` does the work of ``manyeyes data import``.
"""

from __future__ import annotations

from manyeyes.data.importing.importer import import_data
from manyeyes.data.importing.kinds import KINDS

__all__ = ["KINDS", "import_data"]

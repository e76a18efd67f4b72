"""What a worker of Ray Data finds wrong with a user's files reaches the program as it was raised.

Ray Data 2.60 passes on the words of what a worker raised, and in most places loses the exception itself. A
worker therefore gives mistakes as rows, and whoever reads rows raises them.

    worker: carried(work) --> rows, with what was raised     program: raise_carried(rows)
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from mmicl_core.errors import MmiclError

__all__ = ["carried", "raise_carried"]

COLUMN = "mistake"


def carried(work: Callable[[], pa.Table]) -> pa.Table:
    """What `work` gives, or one row with the mistake that it raised."""
    try:
        rows = work()
    except MmiclError as mistake:
        return pa.table({COLUMN: pa.array([pickle.dumps(mistake)], pa.binary())})
    return rows.append_column(COLUMN, pa.nulls(rows.num_rows, pa.binary()))


def raise_carried(row: Mapping[str, Any]) -> None:
    """Raise the mistake that a row holds, if it does.

    Raises:
        MmiclError: as in the worker.
    """
    if row[COLUMN] is not None:
        # It was pickled by a worker of this run.
        raise pickle.loads(row[COLUMN])

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from mmicl_core.data.exchange import bucket_of, read_exchange, write_exchange

BUCKETS = 3


def _write(folder: Path, file: int, values: list[str]) -> Path:
    path = folder / f"{file}.arrow"
    rows = pa.table({"value": values, "row": list(range(10 * file, 10 * file + len(values)))})
    write_exchange(path, rows, BUCKETS, "value")
    return path


def test_rows_of_one_value_meet_in_one_bucket_in_the_order_of_the_files(tmp_path: Path) -> None:
    paths = [_write(tmp_path, 0, ["a", "b", "a", "c"]), _write(tmp_path, 1, ["c", "a"])]
    met = {bucket: read_exchange(paths, bucket).to_pylist() for bucket in range(BUCKETS)}
    assert [row["row"] for row in met[bucket_of("a", BUCKETS)] if row["value"] == "a"] == [0, 2, 11]
    for bucket, rows in met.items():
        assert {bucket_of(row["value"], BUCKETS) for row in rows} <= {bucket}
    assert sum(map(len, met.values())) == 6


def test_bucket_that_nothing_goes_to_is_read_as_an_empty_table(tmp_path: Path) -> None:
    path = _write(tmp_path, 0, [])
    assert [read_exchange([path], bucket).num_rows for bucket in range(BUCKETS)] == [0, 0, 0]

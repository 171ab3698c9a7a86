"""Parquet tables: values and notes come back, and damage is detected."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.files import files_of

from quarkrl.storage.parquet import read_table, write_table


def test_a_table_comes_back_with_its_notes(tmp_path):
    lists = pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))
    table = pa.table({"ids": lists, "reward": [0.1, float("nan"), -0.0]})
    write_table(tmp_path / "t.parquet", table, {"seconds": 0.1})
    found, notes = read_table(tmp_path / "t.parquet")
    assert found["ids"].to_pylist() == [[1, 2], [], [3]] and notes == {"seconds": 0.1}
    assert np.array_equal(found["reward"].to_numpy(), [0.1, np.nan, -0.0], equal_nan=True)
    assert files_of(tmp_path) == {"t.parquet"}


def test_no_changed_byte_changes_a_value_unseen(tmp_path):
    rng = np.random.default_rng(0)
    lists = pa.array([rng.integers(0, 50000, n).tolist() for n in rng.integers(1, 9, 60)], pa.list_(pa.int32()))
    table = pa.table({"ids": lists, "reward": rng.random(60)})
    path = tmp_path / "t.parquet"
    write_table(path, table, {"seconds": 1.5})
    good, refused = path.read_bytes(), 0
    places = rng.choice(len(good), 400, replace=False)
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << int(rng.integers(8)))]) + good[place + 1 :])
        try:
            found, notes = read_table(path)
            assert found.equals(table) and notes == {"seconds": 1.5}, place
        except (pa.ArrowException, OSError, ValueError, KeyError, UnicodeDecodeError):
            refused += 1
    assert refused > 300  # The rest is what Parquet says twice, or nobody reads.


def test_a_file_of_another_program_and_a_changed_value_are_refused(tmp_path):
    table = pa.table({"reward": [0.5, 1.0]})
    pq.write_table(table, tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="no checksum"):
        read_table(tmp_path / "foreign.parquet")
    write_table(tmp_path / "t.parquet", table, {})
    metadata = pq.read_schema(tmp_path / "t.parquet").metadata
    changed = pa.table({"reward": [0.5, 2.0]}).replace_schema_metadata(metadata)
    pq.write_table(changed, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="checksum"):
        read_table(tmp_path / "t.parquet")

"""Features in Parquet files: path, embedding and label of each image, sorted by path. Files are written atomically and
can be read in pieces."""

from __future__ import annotations  # the annotations name pyarrow, which may be missing

import json
import os
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from self_supervised.fields import as_path
from self_supervised.safe_files import atomic_file, to_json

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq
except ImportError as error:  # reports and the demo find neighbors without files
    cause = error  # Python deletes `error` at the end of the block

    class Missing:
        def __getattr__(self, _: str) -> Any:
            raise ImportError(f"Parquet files need the package pyarrow ({cause}): pip install pyarrow") from cause

    pa = pc = ds = pq = Missing()

ROWS = 4096  # rows per row group: the rows that are in memory at a time
ABOUT = b"self_supervised"  # key of the file's metadata, a JSON object


def for_pyarrow(path: str | Path) -> str:
    """Return a path as pyarrow takes it: absolute, because it reads `run:1.parquet` as a URL."""
    return os.path.abspath(as_path(path))


# ---- writing ----


def schema(width: int, about: dict[str, Any]) -> pa.Schema:
    columns = {"path": pa.string(), "embedding": pa.list_(pa.float32(), width), "label": pa.string()}
    return pa.schema(columns, metadata={ABOUT: to_json(about)})


def write_table(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Write each table as one row group."""
    with atomic_file(path) as file, pq.ParquetWriter(for_pyarrow(file), schema, use_dictionary=["label"]) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks(), row_group_size=max(len(table), 1))


def write_part(path: Path, paths: list[str], embeddings: np.ndarray, about: dict[str, Any]) -> None:
    """Write paths [N] and embeddings [N, E]; the labels are not known yet and are null."""
    width = embeddings.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width)
    target = schema(width, about)
    columns = [pa.array(paths), vectors, pa.nulls(len(paths), "string")]
    write_table(path, iter([pa.Table.from_arrays(columns, schema=target)]), target)


def join(out: Path, parts: list[Path], paths: list[str], labels: list[str | None], about: dict[str, Any]) -> None:
    """Write the rows of the sorted paths, each of which is in one of the parts, to one file."""
    target = schema(pq.read_schema(for_pyarrow(parts[0])).field("embedding").type.list_size, about)
    rows = ds.dataset([for_pyarrow(part) for part in parts], schema=target)

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(paths), ROWS):
            some = paths[start : start + ROWS]
            # The range of paths lets pyarrow skip row groups without reading them.
            table = rows.to_table(filter=(pc.field("path") >= some[0]) & (pc.field("path") <= some[-1]))
            table = table.filter(pc.is_in(table["path"], pa.array(some))).sort_by("path")
            assert table["path"].to_pylist() == some
            yield table.set_column(2, "label", pa.array(labels[start : start + ROWS], pa.string()))

    write_table(out, tables(), target)


def write_clusters(features: Path, out: Path, clusters_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a copy of a file with a column `cluster` (int32), which `clusters_of` returns for embeddings [n, E]."""
    with pq.ParquetFile(for_pyarrow(features)) as file:
        names = [name for name in file.schema_arrow.names if name != "cluster"]
        target = pa.schema([file.schema_arrow.field(name) for name in names], file.schema_arrow.metadata)
        target = target.append(pa.field("cluster", pa.int32()))

        def tables() -> Iterator[pa.Table]:
            for batch in file.iter_batches(ROWS):
                clusters = pa.array(clusters_of(matrix(batch["embedding"])), pa.int32())
                yield pa.Table.from_arrays([*(batch[name] for name in names), clusters], schema=target)

        write_table(out, tables(), target)


# ---- reading ----


def facts_of_file(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a file: how its features were computed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a Parquet file of this library.
    """
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        facts = (pq.read_schema(for_pyarrow(path)).metadata or {}).get(ABOUT)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file, or is corrupt: {error}") from error
    if facts is None:
        raise ValueError(f"{path} was not written by `self-supervised embed`. Pass a file that it wrote.")
    return json.loads(facts)


def matrix(embeddings: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return an embedding column as float32 [N, E]."""
    if isinstance(embeddings, pa.ChunkedArray):
        embeddings = embeddings.combine_chunks()
    return embeddings.flatten().to_numpy().reshape(-1, embeddings.type.list_size)


def pieces(path: str | Path) -> Iterator[tuple[list[str], np.ndarray, list[str | None]]]:
    """Yield (paths, embeddings [n, E], labels) of at most ROWS rows at a time, in the order of the file."""
    facts_of_file(path)
    with pq.ParquetFile(for_pyarrow(path)) as file:
        for batch in file.iter_batches(ROWS):
            yield batch["path"].to_pylist(), matrix(batch["embedding"]), batch["label"].to_pylist()


def read_embeddings(path: str | Path) -> tuple[list[str], np.ndarray, list[str | None]]:
    """Return (paths, embeddings float32 [N, E], labels) of all rows."""
    facts_of_file(path)
    table = pq.read_table(for_pyarrow(path))
    return table["path"].to_pylist(), matrix(table["embedding"]), table["label"].to_pylist()


def count_rows(path: str | Path) -> int:
    return pq.read_metadata(for_pyarrow(path)).num_rows


def paths_in(path: str | Path) -> list[str]:
    return pq.read_table(for_pyarrow(path), columns=["path"])["path"].to_pylist()


def rows_of_ids(path: str | Path, ids: list[str]) -> dict[str, tuple[np.ndarray, str | None]]:
    """Return path -> (embedding [E], label) for those of the paths that have a row."""
    one_of = reduce(or_, (pc.field("path") == name for name in ids), pc.scalar(False))
    table = ds.dataset(for_pyarrow(path)).to_table(filter=one_of)
    rows = zip(matrix(table["embedding"]), table["label"].to_pylist(), strict=True)
    return dict(zip(table["path"].to_pylist(), rows, strict=True))

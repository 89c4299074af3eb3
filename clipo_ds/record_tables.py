"""The columns of the run folder's parquet files, and tables of them.

Layer L1, below `clipo_ds.records`, from where the schemas and `embeddings` are imported: pyarrow and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clipo_ds.types import InputError

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),  # rollouts of one prompt in this step share it
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("ground_truth", pa.string(), nullable=False),
        pa.field("extracted", pa.string()),  # the answer that the verifier found, null for none
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("status", pa.string()),  # verified, wrong, no_answer, timeout, error or no_truth; `answers.Verdict`
        pa.field("process_consistent", pa.bool_()),  # null where the text states nothing that can be checked
        pa.field("reward", pa.float32(), nullable=False),  # all rewards together, the contrastive one included
        pa.field("contrastive_loss", pa.float32()),  # null for rollouts that are no valid anchor
        pa.field("contrastive_reward", pa.float32()),  # null in a run without the contrastive term
        pa.field("advantage", pa.float32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),  # of the response
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)
"""Columns of every rollout file. `embedding`, a fixed-size list of float16, follows unless `logging.save_embeddings` is
off, then whatever else the trainer records."""

RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.int64(), nullable=False),  # of the problem, its place in the test set
        pa.field("sample", pa.int32(), nullable=False),  # 0 ... n - 1 of the responses to a problem
        *(
            ROLLOUT_SCHEMA.field(name)
            for name in (
                "prompt", "response", "ground_truth", "extracted", "correct", "status", "process_consistent",
                "num_tokens", "truncated",
            )
        ),
    ]
)  # fmt: skip
"""Columns of the responses of an evaluation."""


def rollout_table(step: int, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.Table:
    """One step's rollouts as a table, its schema's columns first.

    Raises:
        ValueError: A column is missing, or of another length than the rest.
    """
    length = len(next(iter(columns.values()), []))
    columns = {"step": [step] * length, **columns}
    missing = [field.name for field in ROLLOUT_SCHEMA if not field.nullable and field.name not in columns]
    if missing:
        raise ValueError(f"`columns` must hold {', '.join(missing)}, got {', '.join(columns)}")
    for name, values in columns.items():
        if len(values) != length:
            raise ValueError(f"`columns` must be of one length ({length}), got {len(values)} values in {name!r}")
    arrays = {
        field.name: pa.array(columns[field.name] if field.name in columns else [None] * length, field.type)
        for field in ROLLOUT_SCHEMA
    }
    if "embedding" in columns:
        embedding = np.ascontiguousarray(columns["embedding"], dtype=np.float16)  # (N, D)
        arrays["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), embedding.shape[1])
    arrays |= {name: pa.array(values) for name, values in columns.items() if name not in arrays}
    return pa.table(arrays)


def embeddings(table: pa.Table) -> np.ndarray:
    """The embeddings of a table of rollouts as one Float16[N, D] array; a row without one is NaN.

    Raises:
        InputError: The table has none.
    """
    if "embedding" not in table.column_names:
        raise InputError("`table` must have the column embedding (is `logging.save_embeddings` off?), got none")
    column = table.column("embedding").combine_chunks()
    if not pa.types.is_fixed_size_list(column.type):
        return np.full((len(column), 0), np.nan, np.float16)
    if column.null_count == 0:
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    whole = np.full((len(column), column.type.list_size), np.nan, np.float16)
    whole[column.is_valid().to_numpy(zero_copy_only=False)] = column.flatten().to_numpy().reshape(-1, whole.shape[1])
    return whole


def empty_table(columns: Iterable[str] | None) -> pa.Table:
    """No rollouts at all, with these columns, or with those of the schema."""
    known = {field.name: field for field in ROLLOUT_SCHEMA}
    names = known if columns is None else columns
    return pa.schema([known.get(name, pa.field(name, pa.null())) for name in names]).empty_table()

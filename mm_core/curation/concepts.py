"""What captions of a ledger are about: LEDGER/concepts.parquet, a row for every concept of every rule that counts some, the most frequent
of a rule first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.curation.balance_rules import ConceptRule
from mm_core.curation.ruleset import RuleSet
from mm_core.data.ledger import Ledger
from mm_core.store import open_file, reaching, write_whole

SCHEMA = pa.schema([("rule", pa.string()), ("entry", pa.string()), ("matched", pa.int64()), ("kept", pa.int64()), ("weight", pa.float64())])
"""`matched`: samples of the entry (of a reweighed group: in it alone) that the rules before keep. `kept`: those of them that the ledger
keeps. `weight`: what the rule multiplies their sampling weights with; null of a rule that gives none, or gives them none."""


def write_concepts(ledger: Ledger, rules: RuleSet, kept: Mapping[str, NDArray[np.int64]]) -> None:
    """
    Args:
        rules: settled.
        kept: of every rule that counts concepts, by name, the samples that are kept in the end.
    """
    tables = []
    for name, counts in kept.items():
        rule = rules.rules[name]
        assert isinstance(rule, ConceptRule), "only these count concepts"
        count, weights = len(counts), rule.concept_weights
        columns = [pa.repeat(name, count), rule.concepts, rule.counts, counts, pa.nulls(count) if weights is None else weights]
        arrays = [pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, SCHEMA, strict=True)]
        table = pa.table(arrays, schema=SCHEMA)
        tables.append(table.take(pa.array((-rule.counts).argsort(kind="stable"))))
    if tables:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(tables), buffer, compression="zstd")
        with reaching(ledger.url):
            write_whole(f"{ledger.url}/concepts.parquet", buffer.getvalue().to_pybytes())


def read_concepts(ledger: Ledger) -> pa.Table:
    """Empty where no rule of the ledger counts concepts."""
    try:
        with open_file(f"{ledger.url}/concepts.parquet", "rb") as file:
            return pq.read_table(file)
    except FileNotFoundError:
        return SCHEMA.empty_table()

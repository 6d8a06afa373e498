"""`mm data dedup`: which samples are copies of another, and which of them stays; or are in another index, such as a test set.

What is in another index goes first. Among the rest, what hangs together by any method is a group, of which one sample is kept. A
sample's reason is the first method, in the order below, by which it is not the one that is kept. All of it depends on the samples and the
settings alone, not on how many tasks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from pydantic import Field

from mm_core.config import Config
from mm_core.curation.components import NO_PAIRS, Groups, Pairs, grouped, lowest_match
from mm_core.curation.score_rules import EMBEDDINGS, HASH, SIMILARITY, embedded_by, made_by
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import Decided, Ledger, LedgerSummary, Source
from mm_core.data.scores import Scores
from mm_core.data.side_table import SideTable
from mm_core.errors import ConfigError
from pipelines.curate.batches import ALL, opened
from pipelines.curate.comparison import Comparison, Found, Progress, Side
from pipelines.curate.equal_pairs import equal_pairs
from pipelines.curate.picture_pairs import picture_pairs
from pipelines.curate.vector_pairs import vector_pairs
from pipelines.session import ray_session
from pipelines.tasks import run_tasks

Other = tuple[Index, Among]
"""Another index, and those of its samples that are looked at."""


class Method(StrEnum):
    """What makes two samples the same, from the surest on."""

    EXACT = "exact"
    """Every byte of them."""
    PICTURE = "picture"
    """Every byte of their pictures."""
    PERCEPTUAL = "perceptual"
    """Their pictures look the same."""
    SEMANTIC = "semantic"
    """Their pictures' embeddings are nearly the same."""


class Keep(StrEnum):
    """Which of a group stays. At a tie, and by `first`, the earliest in the index."""

    PIXELS = "pixels"
    """The largest picture, then the longest caption."""
    BYTES = "bytes"
    """The most bytes."""
    SIMILARITY = "similarity"
    """The highest score `similarity`."""
    FIRST = "first"


class DedupConfig(Config):
    methods: tuple[Method, ...] = Field(default=(Method.EXACT, Method.PERCEPTUAL))
    distance: int = Field(default=8, ge=0, le=16, description="Bits in which the hashes of two pictures that look the same may differ.")
    similarity: float = Field(default=0.95, gt=0, le=1, description="The least cosine of two embeddings that mean the same.")
    embeddings: str = Field(default=EMBEDDINGS, description="Name of the scores that hold the embeddings.")
    keep: Keep = Keep.PIXELS
    only_against: bool = Field(default=False, description="Look for what is in other indexes, and for no duplicates.")

    @property
    def ordered(self) -> list[Method]:
        return [method for method in Method if method in self.methods]

    def parameters(self, method: Method) -> dict[str, Any]:
        match method:
            case Method.PERCEPTUAL:
                return {"distance": self.distance}
            case Method.SEMANTIC:
                return {"similarity": self.similarity, "embeddings": self.embeddings}
            case _:
                return {}


@dataclass
class _Decision:
    """Of the samples that something was found about, in any order."""

    reasons: list[str]
    reason: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Dropped samples by reason."""
    groups: Groups = field(default_factory=lambda: grouped(NO_PAIRS))
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of each sample in `groups` the one that is kept."""
    matches: Pairs = field(default_factory=lambda: NO_PAIRS)
    """Samples that are in another index, and which there."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def dedup_index(
    index: Index,
    name: str,
    config: DedupConfig,
    *,
    against: Sequence[Other] = (),
    among: Among = ALL,
    replace_ledger: bool = False,
    on_progress: Progress = lambda what: None,
) -> LedgerSummary:
    """Write the ledger `name` of `index`. Samples that are not `among` some are not looked at: else the best of a group could be one that
    is dropped there, and with it the group were gone; they keep the reason they have there. The same settings as those of a ledger that is
    there give it back as it is.

    Its decisions have further columns: `group`, in every group the ordinal of the sample that is kept, its own too; `against` and
    `against_index`, the ordinal of what a sample matches in another index, and the place of that index among those given.

    Raises:
        ConfigError: settings that do not go together, or another ledger of this name is there and is not to be replaced.
        DataError: scores that a method reads are not there; the message has the command that makes them.
    """
    scores = _scores(index, config, among, against)
    reasons = {f"in_{label}": _facts(*other) for label, other in zip(_labels(against), against, strict=True)}
    if not config.only_against:
        reasons |= {f"duplicate_{method}": config.parameters(method) | {"keep": config.keep} for method in config.ordered}
    rule = _rule(config, among, against)
    ledger = Ledger(index, name)
    read = [*among.ledgers, *(name for other, chosen in against if other.url == index.url for name in chosen.ledgers)]
    if found := ledger.claim(rule, scores, among=read, replace=replace_ledger):
        return found
    with ray_session():
        decision = _decide(index, config, against, list(reasons), among, on_progress)
        ledger.remove()
        decided = _write(ledger, decision, [other.summary.rows for other, _ in against], among)
    failed = {reason: len(decision.reason.get(reason, ())) for reason in reasons}
    return ledger.finish(decided, rule=rule, rules=reasons, failed=failed, scores=scores, mask=among.mask, counts=decision.counts)


def _rule(config: DedupConfig, among: Among, against: Sequence[Other]) -> str:
    """All that decides beside the scores, and nothing that does not."""
    methods = [" ".join([method, *(f"{key}={value}" for key, value in config.parameters(method).items())]) for method in config.ordered]
    within = "" if config.only_against else f", keep {config.keep}"
    others = "".join(f", against {other.summary.fingerprint}{chosen}" for other, chosen in against)
    return f"dedup by {', '.join(methods)}{within}{among}{others}"


def _labels(against: Sequence[Other]) -> list[str]:
    """Each index by the last part of its address and its ledgers, with a number where several have the same."""
    labels: list[str] = []
    for other, among in against:
        name = str(Source(index=other.url.rpartition("/")[2], ledgers=among.ledgers))
        labels.append(next(label for label in (name, *(f"{name}_{n}" for n in range(2, len(against) + 2))) if label not in labels))
    return labels


def _facts(other: Index, among: Among) -> dict[str, Any]:
    """What the ledger says of an index that it was made against."""
    return {"index": other.url, "fingerprint": other.summary.fingerprint} | ({"ledgers": list(among.ledgers)} if among.ledgers else {})


def _scores(index: Index, config: DedupConfig, among: Among, against: Sequence[Other]) -> dict[str, str]:
    """Fingerprints of the scores that are read, of every index.

    Raises:
        ConfigError, DataError: there are none, they do not fit each other, or the settings do not.
    """
    if config.only_against and not against:
        raise ConfigError("--only-against looks for what is in other indexes: name one with --against")
    named = {(index.summary.fingerprint, among.fingerprint)}
    for other, chosen in against:
        if (same := (other.summary.fingerprint, chosen.fingerprint)) in named:
            source = Source(index=other.url, ledgers=chosen.ledgers)
            raise ConfigError(
                f"--against {source} is what is looked at itself, or named before: name others, or ledgers of it, {other.url}#LEDGER"
            )
        named.add(same)
    others = [other for other, _ in against]
    found = {name: [Scores(each, name).complete(how) for each in (index, *others)] for name, how in _wanted(config).items()}
    for name, summaries in found.items():
        for other, summary in zip(others, summaries[1:], strict=True):
            if (summary.kind, summary.settings) != (summaries[0].kind, summaries[0].settings):
                raise ConfigError(
                    f"scores {name!r} of {other.url} were measured otherwise than those of {index.url}"
                    f" ({summary.settings}, {summaries[0].settings}): remove one and make it again"
                )
        if name != HASH and summaries[0].kind != EMBEDDINGS:
            raise ConfigError(f"scores {name!r} of {index.url} are no embeddings but {summaries[0].kind}: --embeddings names those")
    prints = {name: " ".join(summary.fingerprint for summary in summaries) for name, summaries in found.items()}
    if config.keep is Keep.SIMILARITY and not config.only_against:
        prints[SIMILARITY] = Scores(index, SIMILARITY).complete(made_by(SIMILARITY, SIMILARITY)).fingerprint
    return prints


def _wanted(config: DedupConfig) -> dict[str, str]:
    """The scores that methods read, and what makes each."""
    wanted = {}
    if {Method.PICTURE, Method.PERCEPTUAL} & set(config.methods):
        wanted[HASH] = HASH
    if Method.SEMANTIC in config.methods:
        wanted[config.embeddings] = embedded_by(config.embeddings)
    return wanted


def _decide(
    index: Index, config: DedupConfig, against: Sequence[Other], reasons: list[str], among: Among, on_progress: Progress
) -> _Decision:
    rows = np.cumsum([0, index.summary.rows, *(other.summary.rows for other, _ in against)])
    ours = Side(index.url, 0, index.summary.rows, among)
    theirs = tuple(
        Side(other.url, int(offset), other.summary.rows, chosen) for (other, chosen), offset in zip(against, rows[1:-1], strict=True)
    )
    decision = _Decision(reasons)
    if against:
        _leave_out_matches(decision, Comparison(ours, theirs), config, on_progress)
    if not config.only_against:
        _group(decision, Comparison(ours, left_out=ray.put(np.sort(decision.matches[:, 0]))), config, index, on_progress)
    return decision


def _find(method: Method, comparison: Comparison, config: DedupConfig, on_progress: Progress) -> Found:
    match method:
        case Method.PERCEPTUAL:
            return picture_pairs(comparison, config.distance, on_progress=on_progress)
        case Method.SEMANTIC:
            return vector_pairs(comparison, config.embeddings, config.similarity, on_progress=on_progress)
        case _:
            return equal_pairs(comparison, pictures=method is Method.PICTURE, on_progress=on_progress)


def _leave_out_matches(decision: _Decision, comparison: Comparison, config: DedupConfig, on_progress: Progress) -> None:
    """What another index has. A sample that several methods find has the match of the first."""
    for method in config.ordered:
        found = _find(method, comparison, config, on_progress)
        new = found.pairs[~np.isin(found.pairs[:, 0], decision.matches[:, 0])]
        decision.matches = np.concatenate([decision.matches, lowest_match(new)])
        decision.counts[f"against_{method}"] = {"dropped": len(new), **found.counts}
    place = np.searchsorted([side.offset for side in comparison.against], decision.matches[:, 1], side="right") - 1
    for number in range(len(comparison.against)):
        decision.reason[decision.reasons[number]] = decision.matches[place == number, 0]


def _group(decision: _Decision, comparison: Comparison, config: DedupConfig, index: Index, on_progress: Progress) -> None:
    """Method by method: a sample that is the best of its group by one may not be of the larger group by the next, never the other way."""
    pairs, dropped = NO_PAIRS, np.zeros(0, np.int64)
    for method in config.ordered:
        found = _find(method, comparison, config, on_progress)
        pairs = np.concatenate([pairs, found.pairs])
        groups = grouped(pairs)
        kept = groups.best(*_keys(index, config.keep, groups.samples))
        new = np.setdiff1d(groups.samples[kept != groups.samples], dropped, assume_unique=True)
        dropped = np.union1d(dropped, new)
        decision.reason[f"duplicate_{method}"] = new
        own = grouped(found.pairs)
        decision.counts[str(method)] = {"groups": own.count, "dropped": len(new), "largest": own.largest, **found.counts}
        decision.groups, decision.kept = groups, kept


def _keys(index: Index, keep: Keep, samples: NDArray[np.int64]) -> list[NDArray[Any]]:
    """What the samples are ranked by."""
    if keep is Keep.FIRST:
        return []
    if keep is Keep.BYTES:
        return [index.locators["span"][samples].astype(np.int64)]
    table = Scores(index, SIMILARITY).values if keep is Keep.SIMILARITY else SideTable("", index.summary.rows)
    chunks = [chunk for chunk in range(len(table)) if np.diff(np.searchsorted(samples, table.bounds(chunk)))[0]]
    found = dict(run_tasks(partial(_keys_of_chunk, index.url, keep, table, samples), chunks))
    columns = [found[number] for number in range(len(chunks))]
    return list(np.concatenate(columns, axis=1)) if columns else []


def _keys_of_chunk(url: str, keep: Keep, table: SideTable, samples: NDArray[np.int64], chunk: int) -> NDArray[np.float64]:
    """[keys, samples in the chunk]."""
    first, last = table.bounds(chunk)
    low, high = np.searchsorted(samples, [first, last])
    places = samples[low:high] - first
    if keep is Keep.SIMILARITY:
        return table.read(chunk, ["similarity"])["similarity"].to_numpy()[places].astype(np.float64)[None]
    rows = opened(url).rows(first, last, ["width", "height", "caption_characters"])
    width, height, characters = (column.fill_null(0).to_numpy().astype(np.float64)[places] for column in rows.columns)
    return np.stack([width * height, characters])


def _write(ledger: Ledger, decision: _Decision, rows: Sequence[int], among: Among) -> list[Decided]:
    """The decisions on every row, a chunk at a time."""
    dropped = [
        (samples, number)
        for number, reason in enumerate(decision.reasons)
        for samples in [decision.reason.get(reason)]
        if samples is not None
    ]
    samples = np.concatenate([np.zeros(0, np.int64), *(each for each, _ in dropped)])
    codes = np.repeat([number for _, number in dropped], [len(each) for each, _ in dropped]).astype(np.int64)
    order, matched = np.argsort(samples), np.argsort(decision.matches[:, 0])
    offsets = np.cumsum([ledger.index.summary.rows, *rows])
    facts = (samples[order], codes[order], decision.groups.samples, decision.kept, decision.matches[matched], offsets)
    task = partial(_write_chunk, ledger.index.url, ledger.name, decision.reasons, among, ray.put(facts))
    decided = dict(run_tasks(task, range(len(ledger.decisions))))
    return [decided[chunk] for chunk in sorted(decided)]


def _write_chunk(url: str, name: str, reasons: list[str], among: Among, facts: ray.ObjectRef, chunk: int) -> Decided:
    dropped, codes, members, best, matches, offsets = ray.get(facts)
    ledger = Ledger(opened(url), name)
    first, last = ledger.decisions.bounds(chunk)
    reason = _spread(dropped, codes, first, last)
    theirs = _spread(matches[:, 0], matches[:, 1], first, last)
    place = np.searchsorted(offsets, theirs, side="right") - 1
    more = {
        "fails": np.where(reason >= 0, np.uint64(1) << reason.clip(0).astype(np.uint64), np.uint64(0)),
        "group": _column(_spread(members, best, first, last), pa.uint64()),
        "against": _column(np.where(theirs >= 0, theirs - offsets[place.clip(0)], -1), pa.uint64()),
        "against_index": _column(np.where(theirs >= 0, place, -1), pa.uint32()),
    }
    texts = pa.array(reasons, pa.string()).take(pa.array(reason, mask=reason < 0))
    if among.ledgers:
        texts = pc.coalesce(among.reasons(ledger.index, first, last), texts)
    kept = (reason < 0) & among.rows(ledger.index, first, last)
    return ledger.write_chunk(chunk, kept.astype(np.float32), texts, more)


def _spread(samples: NDArray[np.int64], values: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """The values of the rows from `first` up to `last`, -1 where a row has none. `samples` ascend."""
    spread = np.full(last - first, -1, dtype=np.int64)
    low, high = np.searchsorted(samples, [first, last])
    spread[samples[low:high] - first] = values[low:high]
    return spread


def _column(values: NDArray[np.int64], kind: pa.DataType) -> pa.Array:
    return pa.array(values, mask=values < 0).cast(kind, safe=False)

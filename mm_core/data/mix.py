"""Several sources as one endless order: which source a chunk comes from, and which of that source's chunks it is.

Guarantees: both are pure functions of the chunk number, in constant memory, so the data cursor stays one integer; after every whole
period of the weights each source has had exactly its share, and in between no source is more than ceil(log2(sources)) chunks off
(units, where the source is chosen per step); where the weights change, what a source is owed goes on into the next; inside a source
nothing is repeated before its epoch is over, as its own `Plan` orders it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
from pydantic import Field

from mm_core.config import Config
from mm_core.data.permutation import U64, mix
from mm_core.data.plan import Places, Plan
from mm_core.errors import ConfigError

_SOURCE = 5
"""Keeps the sources' seeds apart from the keys of the plan and the reader."""
_MAX_PERIOD = 1 << 31
"""Counting multiplies two numbers below the period: beyond this they could leave 64 bits."""


class Choice(StrEnum):
    """How often a source is chosen."""

    CHUNK = "chunk"
    STEP = "step"


class MixChange(Config):
    """Other weights from a step on."""

    step: int = Field(gt=0, description="First global step of these weights.")
    weights: tuple[float, ...] = Field(description="One per source; 0 leaves a source out.")


class MixConfig(Config):
    """In which proportions several indexes are read."""

    weights: tuple[float, ...] = Field(default=(), description="One per index, e.g. [3, 1]; by default as many as samples are kept.")
    choice: Choice = Field(default=Choice.CHUNK, description="step where sources differ in modality: a step is then of one source.")
    changes: tuple[MixChange, ...] = Field(default=(), description="Other weights from given steps on, in ascending order.")


@dataclass(frozen=True)
class Phase:
    """Whole-number weights from a chunk on."""

    first_chunk: int
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.weights) < 0 or not 0 < sum(self.weights) < _MAX_PERIOD:
            raise ConfigError(f"mix weights {list(self.weights)}: none may be negative, one must be positive, their sum below 2^31")


@dataclass(frozen=True)
class MixedPlan:
    """The order of several sources: each keeps the order of its own plan, and chunks are dealt out by weight.

    `unit` chunks in a row are of one source: 1, or the chunks of a step where the source is chosen per step.
    """

    plans: tuple[Plan, ...]
    phases: tuple[Phase, ...]
    unit: int = 1

    def __post_init__(self) -> None:
        starts = [phase.first_chunk for phase in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or any(start % self.unit for start in starts):
            raise ConfigError(f"the mix changes at chunks {starts}: they must ascend from 0, in whole units of {self.unit}")
        if any(len(phase.weights) != len(self.plans) for phase in self.phases):
            given = [len(phase.weights) for phase in self.phases]
            raise ConfigError(f"data.mix gives {given} weights for {len(self.plans)} indexes: give one weight per --data, in their order")
        if len({plan.chunk for plan in self.plans}) > 1:
            raise ConfigError("the sources of a mix must have chunks of one length")

    @property
    def chunk(self) -> int:
        return self.plans[0].chunk

    @property
    def fingerprint(self) -> str:
        """Names the order of all sources together."""
        phases = [(phase.first_chunk, phase.weights) for phase in self.phases]
        text = f"mix-1 {[plan.fingerprint for plan in self.plans]} {phases} {self.unit}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def locate(self, positions: U64, ahead: int = 0) -> Places:
        """Source, epoch of that source and place on its kept axis of each global position; with `ahead`, that many chunks of the
        same source later."""
        chunk = np.uint64(self.chunk)
        sources, numbers = self.chunks(positions // chunk)
        local = (numbers + np.uint64(ahead)) * chunk + positions % chunk
        epochs, kept = np.empty_like(local), np.empty_like(local)
        for source in np.unique(sources):
            chosen = sources == source
            epochs[chosen], kept[chosen] = self.plans[int(source)].resolve(local[chosen])
        return Places(sources, epochs, kept)

    def chunks(self, numbers: U64) -> tuple[U64, U64]:
        """Source of each chunk, and how many chunks of that source came before it."""
        size = np.uint64(self.unit)
        units = numbers // size
        before, after = self._counts(units), self._counts(units + np.uint64(1))
        sources = np.argmax(after > before, axis=0)
        earlier = np.take_along_axis(before, sources[None], axis=0)[0]
        return sources.astype(np.uint64), earlier * size + numbers % size

    def consumed(self, chunks: int) -> list[int]:
        """Samples of each source in the first `chunks` chunks, a whole number of units."""
        counts = self._counts(np.array([chunks // self.unit], dtype=np.uint64))
        return [int(n) * self.unit * self.chunk for n in counts[:, 0]]

    def _counts(self, units: U64) -> U64:
        """How many of the first `units` units are of each source: [sources, len(units)]."""
        total = np.zeros((len(self.plans), len(units)), dtype=np.uint64)
        ends = [phase.first_chunk // self.unit for phase in self.phases[1:]]
        for phase, end, owed in zip(self.phases, [*ends, None], self._owed, strict=True):
            start = np.uint64(phase.first_chunk // self.unit)
            inside = units if end is None else np.minimum(units, np.uint64(end))
            total += np.stack(_deal(np.maximum(inside, start) - start, phase.weights, owed))
        return total

    @cached_property
    def _owed(self) -> list[Owed]:
        """What every phase begins with: what the ones before it left over."""
        owed: list[Owed] = [{}]
        for phase, following in pairwise(self.phases):
            units = (following.first_chunk - phase.first_chunk) // self.unit
            owed.append(_left_over(units, phase.weights, owed[-1], following.weights))
        return owed


Owed = dict[str, int]
"""By half of the sources (the way to it, as `0` and `1`), the part of a unit that its first half is owed, in units of 1/sum of weights."""


def _deal(units: U64, weights: Sequence[int], owed: Owed, half: str = "") -> list[U64]:
    """Share units out in proportion: halve the sources, give the first half its floor, the second the rest, and go on in each."""
    if len(weights) == 1:
        return [units]
    middle = len(weights) // 2
    left, whole = np.uint64(sum(weights[:middle])), np.uint64(max(1, sum(weights)))
    periods, rest = units // whole, units % whole
    first = periods * left + (rest * left + np.uint64(owed.get(half, 0))) // whole
    return [*_deal(first, weights[:middle], owed, f"{half}0"), *_deal(units - first, weights[middle:], owed, f"{half}1")]


def _left_over(units: int, weights: Sequence[int], owed: Owed, following: Sequence[int], half: str = "") -> Owed:
    """What `units` units leave for the next phase: without it a source of weight 1 in 1,001 would get its first chunk, or none, in every
    phase of some chunks anew."""
    if len(weights) == 1:
        return {}
    middle = len(weights) // 2
    left, whole = sum(weights[:middle]), max(1, sum(weights))
    first, rest = divmod(units * left + owed.get(half, 0), whole)
    return (
        {half: rest * max(1, sum(following)) // whole}
        | _left_over(first, weights[:middle], owed, following[:middle], f"{half}0")
        | _left_over(units - first, weights[middle:], owed, following[middle:], f"{half}1")
    )


def source_seed(seed: int, source: int) -> int:
    """The seed of a source's plan: the run's for the first, so that adding a source does not reorder it."""
    return seed if source == 0 else int(mix(seed, _SOURCE, source))


def mixed_plan(plans: Sequence[Plan], config: MixConfig, chunks_per_step: int) -> Plan | MixedPlan:
    """The order of a run: of one source its plan as it is, of several their mix.

    Raises:
        ConfigError: weights that do not fit the sources, changes out of order.
    """
    if len(plans) == 1:
        if config.weights or config.changes:
            raise ConfigError("data.mix has weights, but there is one index: give the others with --data, or leave data.mix out")
        return plans[0]
    weights = config.weights or _by_size(plans)
    phases = [Phase(0, _whole(weights))]
    phases += [Phase(change.step * chunks_per_step, _whole(change.weights)) for change in config.changes]
    return MixedPlan(tuple(plans), tuple(phases), chunks_per_step if config.choice is Choice.STEP else 1)


def _by_size(plans: Sequence[Plan]) -> tuple[int, ...]:
    """As many as samples are kept; of billions the leading 30 bits, so that the period stays countable."""
    shift = max(0, sum(plan.samples for plan in plans).bit_length() - 30)
    return tuple(max(1, plan.samples >> shift) for plan in plans)


def _whole(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion; 0.1 counts as a tenth, not as the nearest binary fraction."""
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"mix weights {list(weights)} must be finite")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole) or 1
    return tuple(weight // divisor for weight in whole)

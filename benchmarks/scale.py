"""docs/scale.md: what mm costs at 10⁹ samples and 512 GPUs, computed from measured figures and from assumptions that are written down.

python -m benchmarks.scale > docs/scale.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mm_core.models.family import resolved
from mm_core.training.cost import sample_cost
from pipelines.recipes import recipe
from pipelines.stream import StreamConfig

DAY_S = 86_400
GOAL = 0.95


@dataclass(frozen=True)
class Measured:
    """A figure: the number as benchmarks/RESULTS.md has it, what makes `unit` of it, and the words there that it is taken from."""

    said: str
    times: float
    unit: str
    what: str
    quote: str

    @property
    def value(self) -> float:
        return float(self.said.replace(",", "")) * self.times


@dataclass(frozen=True)
class Assumed:
    value: float
    unit: str
    what: str
    why: str


_KEPT = "| 0.3 | 0.6831, 1.000 | 0.0234, 3.243 |"
B32_RATE = Measured("7,833", 1, "samples/s", "`clip-vit-b32` on one H200, compiled, 1,024 a GPU", "| **7,833** (0.349, 36.0) |")
L14_RATE = Measured("790", 1, "samples/s", "`clip-vit-l14` on one H200, compiled, 128 a GPU", "| **790** (0.420, 37.1) |")
DECODED = Measured(
    "1,382", 1 / 2, "images/s", "a core reads, decodes and hands on, 400x533 JPEG → 224; two cores", "| **1,382**, which is **0.85**"
)
INDEX_SAMPLE = Measured("50", 1e-6, "s", "of a core for each sample indexed", "index costs 50 µs of a core for each sample")
INDEX_HASH = Measured("1.7", 1e9, "bytes/s", "of a core for the digest of its bytes", "SHA-256 of its bytes at 1.7 GB/s")
INDEX_FILES = Measured("230", 1, "bytes", "a sample in an index, with its captions; at most", "An index has 180 to 230 bytes a sample")
PLAN_FILES = Measured(
    "26", 1, "bytes", "a sample in what is read while training, 0.3 kept; 26 GB for 10⁹", "does not grow | | as above | 26 GB |"
)
PLAN_MEMORY = Measured("200", 1e6, "bytes", "of a planning process that no file backs", "1.8 ms, 2.7 ms | 1.9 ms | 200 MB |")
PLAN_TIME = Measured("1.8", 1e-3, "s", "from 256 positions anywhere to byte ranges", "1.8 ms, 2.7 ms | 1.9 ms | 200 MB |")
FILTER_ROW = Measured("3.7", 1e-6, "s", "of a core for each row of a filter of four rules and `balance`", "| 10⁷ | 37.3 | 3.7 |")
REQUESTS = Measured("0.0171", 1, "requests", "a sample, all kept, runs of 64", "| 1.0 | 0.0171, 1.000 |")
REQUESTS_KEPT = Measured("0.0234", 1, "requests", "a sample, three tenths kept, gaps up to 256 KB read through", _KEPT)
READ_KEPT = Measured("3.243", 1, "", "bytes read for each byte needed then", _KEPT)
BLOCKED = Measured("0.36", 1, "s", "that a checkpoint holds a step up", "A step waits **0.36 s**")
STATE = Measured("1.8", 1e9, "bytes", "its size, on two ranks", "1.8 GB of state")
WRITTEN = Measured("3.7", 1, "s", "until it is written, to a local disk", "the thread writes for 3.7 s")
RECOVERY = Measured("23.3", 1, "s", "from a lost raylet to the next step, with its node's start; middle of three", "24.2, 22.2, 23.3")
RECOVERY_WORST = Measured("98.5", 1, "s", "the longest of all roles and seeds", "| 98.5 |")
MEASURED = (
    B32_RATE, L14_RATE, DECODED, INDEX_SAMPLE, INDEX_HASH, INDEX_FILES, PLAN_FILES, PLAN_MEMORY, PLAN_TIME, FILTER_ROW, REQUESTS,
    REQUESTS_KEPT, READ_KEPT, BLOCKED, STATE, WRITTEN, RECOVERY, RECOVERY_WORST,
)  # fmt: skip

SAMPLES = Assumed(1e9, "samples", "in the index", "the question")
GPUS = Assumed(512, "GPUs", "of the H200's kind, 8 a node", "the question")
SAMPLE_BYTES = Assumed(97e3, "bytes", "a sample", "the web photos of RESULTS.md (CC12M); its Flickr8k has 11 KB")
SHARD_SAMPLES = Assumed(10_000, "samples", "a shard", "img2dataset's default")
EFFICIENCY = Assumed(
    1.0, "", "of 512 single GPUs that 512 together reach", "the most that data can be asked for; messages and small batches make it less"
)
GET_PRICE = Assumed(0.0004, "dollars", "for 1,000 GETs", "S3 standard, in the bucket's region")
PREFIX_GETS = Assumed(5_500, "GETs/s", "that S3 promises for a prefix", "AWS's documentation")
NODE_CORES = Assumed(96, "cores", "of a node with 8 GPUs", "192 hardware threads, as cloud machines with eight H100s or H200s have")
FAILURES = Assumed(6.5 / 1000, "failures", "a node and day", "Kokolis et al. 2024 (arXiv 2410.21680), the larger of two clusters of A100s")
LLAMA = Assumed(
    419 / 54 / 16_384, "failures", "a GPU and day", "Grattafiori et al. 2024 (arXiv 2407.21783): 419 in 54 days of 16,384 H100s"
)
RECOVERY_LARGE = Assumed(
    600, "s", "to the next step where a node has to be replaced first", "ten minutes for a machine and its image; measure your own"
)
ASSUMED = (SAMPLES, GPUS, SAMPLE_BYTES, SHARD_SAMPLES, EFFICIENCY, NODE_CORES, GET_PRICE, PREFIX_GETS, FAILURES, LLAMA, RECOVERY_LARGE)
GPUS_PER_NODE = 8
RECOVERIES_S = (RECOVERY.value, RECOVERY_WORST.value, RECOVERY_LARGE.value)


def best_interval_s(blocked_s: float, between_failures_s: float) -> float:
    """Between checkpoints, by what each holds up and how often one is needed (Young 1974; Daly 2006 for long recoveries adds little)."""
    return math.sqrt(2 * blocked_s * between_failures_s)


def ettr(between_failures_s: float, recovery_s: float, interval_s: float, blocked_s: float) -> float:
    """Effective training time ratio: of the time, what neither recovers, nor repeats half an interval, nor is held up."""
    lost = (recovery_s + interval_s / 2) / (between_failures_s + recovery_s + interval_s / 2)
    return (1 - lost) * interval_s / (interval_s + blocked_s)


def parameters(name: str) -> int:
    return sample_cost(resolved(recipe(name).model), views=1, captions=1).parameters


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float) -> str:
    """Three digits."""
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10**exponent:.3g} × 10^{exponent}" if abs(exponent) > 5 or value < 0.01 else f"{value:,.0f}"


def size(value: float) -> str:
    for unit, bound in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= bound:
            return f"{value / bound:.3g} {unit}"
    return f"{value:.3g} B"


def duration(seconds: float) -> str:
    for unit, bound in (("days", 2 * DAY_S), ("h", 7200), ("min", 120)):
        if seconds >= bound:
            return f"{seconds / {'days': DAY_S, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"


def data_rows() -> Iterator[tuple[str, str, str]]:
    samples, bytes_ = SAMPLES.value, SAMPLES.value * SAMPLE_BYTES.value
    index_s = samples * (INDEX_SAMPLE.value + SAMPLE_BYTES.value / INDEX_HASH.value)
    yield "shards", f"{samples / SHARD_SAMPLES.value:,.0f}, {size(bytes_)}", f"{size(SHARD_SAMPLES.value * SAMPLE_BYTES.value)} each"
    yield "index", size(samples * INDEX_FILES.value), f"{INDEX_FILES.value:.0f} B a sample, in the store"
    yield (
        "of it read while training",
        size(samples * PLAN_FILES.value),
        "mapped from each node's disk; in its page cache where memory allows",
    )
    yield (
        "making the index",
        f"{index_s / 3600:.0f} core hours",
        f"{duration(index_s / 1000)} on 1,000 cores, which then read {size(bytes_ / index_s * 1000)}/s",
    )
    yield "a filter", f"{samples * FILTER_ROW.value / 3600:.1f} core hours", "four rules and `balance`; the pictures are not read"
    yield "planning, a process", size(PLAN_MEMORY.value), "the same at 10⁷ and 10⁸ samples; no list of samples anywhere"
    yield (
        "planning, a block of 256",
        f"{PLAN_TIME.value * 1e3:.1f} ms",
        f"{PLAN_TIME.value / 256 * 1e6:.0f} µs a sample, beside {1e3 / DECODED.value:.1f} ms to decode it",
    )


def feed_rows() -> Iterator[tuple[str, str, str]]:
    rates = [GPUS.value * EFFICIENCY.value * rate.value for rate in (B32_RATE, L14_RATE)]
    nodes, per_node = GPUS.value / GPUS_PER_NODE, GPUS_PER_NODE

    def both(what: str, cells: Sequence[str]) -> tuple[str, str, str]:
        return (what, cells[0], cells[1])

    yield both("samples/s of all GPUs", [f"{rate:,.0f}" for rate in rates])
    yield both("an epoch of 10⁹", [duration(SAMPLES.value / rate) for rate in rates])
    yield both("**cores for a GPU**", [f"**{rate.value / DECODED.value:.1f}**" for rate in (B32_RATE, L14_RATE)])
    yield both(f"cores for a node of {per_node}", [f"{per_node * rate.value / DECODED.value:.0f}" for rate in (B32_RATE, L14_RATE)])
    yield both("read by a node, all kept", [f"{size(rate * SAMPLE_BYTES.value / nodes)}/s" for rate in rates])
    yield both("read by all nodes", [f"{size(rate * SAMPLE_BYTES.value)}/s" for rate in rates])
    yield both("GETs/s, all kept", [f"{rate * REQUESTS.value:,.0f}" for rate in rates])
    yield both("prefixes of S3 for that", [f"{math.ceil(rate * REQUESTS.value / PREFIX_GETS.value)}" for rate in rates])
    yield both("GETs/s, three tenths kept", [f"{rate * REQUESTS_KEPT.value:,.0f}" for rate in rates])
    config = StreamConfig()
    held = [config.blocks_ahead(rate.value / DECODED.value) * config.block_bytes for rate in (B32_RATE, L14_RATE)]
    yield both("object store of a node, where segments meet", [size(2 * GPUS_PER_NODE * each) for each in held])


def failure_rows() -> Iterator[tuple[str, ...]]:
    state = 12 * parameters("clip-vit-l14")
    blocked = BLOCKED.value * state / STATE.value
    daily = FAILURES.value * GPUS.value / GPUS_PER_NODE
    for name, between in (
        ("a failure an hour (spot)", 3600.0),
        ("every six hours", 6 * 3600.0),
        (f"{daily:.2f} a day (the assumption)", DAY_S / daily),
        (f"{LLAMA.value * GPUS.value:.2f} a day (Llama 3's)", DAY_S / (LLAMA.value * GPUS.value)),
    ):
        interval = best_interval_s(blocked, between)
        yield (name, duration(interval), *(f"{ettr(between, recovery_s, interval, blocked):.4f}" for recovery_s in RECOVERIES_S))


def below_goal() -> Iterator[str]:
    for name, _, *cells in failure_rows():
        for recovery_s, cell in zip(RECOVERIES_S, cells, strict=True):
            if float(cell) < GOAL:
                yield f"{name}, {recovery_s:.0f} s each ({cell})"


def checkpoint_rows() -> Iterator[tuple[str, ...]]:
    states = [12 * parameters(name) for name in ("clip-vit-b32", "clip-vit-l14")]
    yield ("parameters", *(f"{state / 12 / 1e6:.0f} million" for state in states))
    yield ("state: weights and AdamW's two moments in fp32", *(size(state) for state in states))
    yield ("of it a rank's", *(size(state / GPUS.value) for state in states))
    yield ("a step is held up, as on one machine of two ranks", *(f"{BLOCKED.value * state / STATE.value:.2f} s" for state in states))
    rate = STATE.value / WRITTEN.value
    yield (f"written behind it, were all of it one disk's ({size(rate)}/s)", *(f"{state / rate:.1f} s" for state in states))
    yield ("in a minute between checkpoints the store takes", *(f"{size(state / 60)}/s" for state in states))


PAGE = """# A billion samples, 512 GPUs

Nobody ran this. It is computed by `python -m benchmarks.scale` from figures of [benchmarks/RESULTS.md](../benchmarks/RESULTS.md), which
were measured on small machines and one GPU, and from the assumptions below. Change an assumption there, and read what follows from it.

## Data

{data}

An epoch is {gets} million GETs, ${price}; one of three tenths of the samples {kept_gets} million, ${kept_price},
and {amplification} times the bytes it needs: `mm data export` writes shards of what is kept once, and saves that at every epoch.

## Feeding the GPUs

{feeding}

So feeding B/32 takes {share_b32} of a node's cores, and L/14 {share_l14}. The pictures that were measured are of 400x533 pixels
and 31 KB; larger ones take more, for which there is no figure here. The stream has no part that all blocks pass through: each rank's
dataset reads its own, so these are costs of a node, and do not grow with their number.

## Checkpoints

{checkpoints}

## Failures

ETTR, the share of the time that training goes forward, of `clip-vit-l14`, with a checkpoint as often as Young's rule asks, by the time
from a failure to the next step:

{failures}

Below the goal of {goal}: {below}. There, let a run go on with the nodes that are left
(`--workers 480..512`). The two measured recoveries are of a small model on two cores: loading {state} on 512 ranks, and starting NCCL among
them, come on top and were not measured.

## Assumed

{assumed}

## Measured

{measured}
"""


def page() -> str:
    gets, kept_gets = SAMPLES.value * REQUESTS.value, 0.3 * SAMPLES.value * REQUESTS_KEPT.value
    share = [GPUS_PER_NODE * rate.value / DECODED.value / NODE_CORES.value for rate in (B32_RATE, L14_RATE)]
    recoveries = (f"{RECOVERY.value:.0f} s (measured, median)", f"{RECOVERY_WORST.value:.0f} s (measured, longest)")
    replaced = f"{RECOVERY_LARGE.value:.0f} s (a node to replace)"
    both = ("`clip-vit-b32`", "`clip-vit-l14`")
    return PAGE.format(
        data=table(("part", "cost at 10⁹ samples", "how"), list(data_rows())),
        gets=f"{gets / 1e6:.1f}",
        price=f"{gets / 1000 * GET_PRICE.value:.2f}",
        kept_gets=f"{kept_gets / 1e6:.1f}",
        kept_price=f"{kept_gets / 1000 * GET_PRICE.value:.2f}",
        amplification=f"{READ_KEPT.value:.1f}",
        feeding=table(("all at once", *both), list(feed_rows())),
        share_b32=f"{share[0]:.0%}",
        share_l14=f"{share[1]:.0%}",
        checkpoints=table(("", *both), list(checkpoint_rows())),
        failures=table(("failures", "checkpoint every", *recoveries, replaced), list(failure_rows())),
        goal=GOAL,
        below="; ".join(below_goal()),
        state=size(12 * parameters("clip-vit-l14")),
        assumed=table(("assumed", "", "why"), [(each.what, amount(each), each.why) for each in ASSUMED]),
        measured=table(
            ("measured", "", "in RESULTS.md"), [(each.what, amount(each), f"`{each.quote.replace('|', '¦')}`") for each in MEASURED]
        ),
    )


def amount(figure: Measured | Assumed) -> str:
    return f"{number(figure.value)} {figure.unit}".strip()


if __name__ == "__main__":
    print(page(), end="")

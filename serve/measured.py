"""What the gateway counts, for Prometheus: requests, and what shows that inputs or a model have drifted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.encoded import Encoded
from serve.traffic import Traffic

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NORMS = tuple(round(float(edge), 3) for edge in np.geomspace(0.5, 64, 22))
_SCORES = tuple(round(edge / 20, 2) for edge in range(-4, 21))


class Measured:
    """One process's numbers."""

    def __init__(self, gateway: str = "") -> None:
        """`gateway`: which process this is. Several answer behind one address, and their series must not be taken for one."""
        self._gateway = gateway
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("mm_requests", "Requests answered.", ("route", "status"), registry=registry)
        self._seconds = Histogram("mm_request_seconds", "Time to the last byte.", ("route",), buckets=_SECONDS, registry=registry)
        self.running = Gauge("mm_requests_running", "Requests in the gateway.", registry=registry)
        self.waiting = Gauge("mm_inputs_waiting", "Inputs handed to models and not answered.", registry=registry)
        self._inputs = Counter("mm_inputs", "Inputs encoded.", ("model", "version", "kind"), registry=registry)
        self._tokens = Counter("mm_tokens", "Tokens read.", ("model", "version"), registry=registry)
        self._lost = Counter("mm_lost_copies", "Times that a copy of a model was lost while it answered.", ("model",), registry=registry)
        self._norms = Histogram(
            "mm_embedding_norm",
            "Length of vectors before they are normalised; drifts with the inputs.",
            ("model", "version", "kind"),
            buckets=_NORMS,
            registry=registry,
        )
        self._top = Histogram(
            "mm_top_score",
            "Best score of an answer: the probability of a class, the cosine of a search or match.",
            ("model", "version", "route"),
            buckets=_SCORES,
            registry=registry,
        )
        self._percent = Gauge("mm_version_percent", "Of a model's requests.", ("model", "version"), registry=registry)
        self._refused = Gauge("mm_version_refused", "1 while a newer version is refused.", ("model",), registry=registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def encoded(self, model: str, version: str, kinds: Sequence[str], result: Encoded) -> None:
        """`kinds`: of each vector what it is of, text, image or pair."""
        for kind, norm in zip(kinds, result.norms, strict=True):
            self._norms.labels(model, version, kind).observe(float(norm))
        for kind in set(kinds):
            self._inputs.labels(model, version, kind).inc(kinds.count(kind))
        self._tokens.labels(model, version).inc(result.tokens)

    def lost(self, model: str) -> None:
        self._lost.labels(model).inc()

    def top_score(self, model: str, version: str, route: str, score: float) -> None:
        self._top.labels(model, version, route).observe(score)

    def traffic(self, traffic: Traffic) -> None:
        self._percent.clear()
        for slot in traffic.slots:
            self._lost.labels(slot.name)  # 0 until then: what begins at 1 has not risen, for an alert
            self._refused.labels(slot.name).set(slot.refused is not None)
            for share in slot.shares:
                self._percent.labels(slot.name, share.version.reference).set(share.percent)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        labelled = CollectorRegistry()
        labelled.register(_Labelled(self._registry, self._gateway))
        return generate_latest(labelled)


class _Labelled(Collector):
    """The metrics of a registry, each with the label `gateway`."""

    def __init__(self, registry: CollectorRegistry, gateway: str) -> None:
        self._registry, self._label = registry, {"gateway": gateway}

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels=self._label | dict(sample.labels)) for sample in metric.samples]
            yield metric

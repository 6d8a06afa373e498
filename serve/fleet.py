"""Versions of models as Serve applications: brought up beside those that answer, tried, and only then given requests; taken down when
nobody can be waiting for them any more.

A version that fails its digest, its loading or the canned query never answers anybody: what answered before goes on, and the reason is
told. It is tried again after a while, or when something else should answer.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import ray.serve
from ray.serve.api import RunTarget
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

from mm_core.errors import MMError, ServiceError
from serve.config import ServeConfig
from serve.encoder import Encoder
from serve.facts import Version
from serve.prepare import Preparer
from serve.store import ModelStore
from serve.traffic import Share, Slot, Traffic

logger = logging.getLogger("ray.serve")
APPLICATION = "mm"
"""Of the gateway; those of versions begin with it."""
_PROBE_TIMEOUT_S = 300
_LOOK_EVERY_S = 0.1
_TRY_AGAIN_S = 60
_MAX_REASON = 400
_ENCODER_CPUS, _PREPARER_CPUS = 0.2, 0.1
"""Little, so that on two cores the next version, and one of another model, still find room beside those that answer."""


@dataclass(frozen=True)
class Wanted:
    """A model to serve."""

    name: str
    reference: str
    canary: str | None = None
    """Another reference, which gets `percent` of the requests."""
    percent: float = 0

    @property
    def references(self) -> list[str]:
        return [self.reference, *([self.canary] if self.canary else [])]


@dataclass(frozen=True)
class Searched:
    """The model that a search index was made with: it stays up for that, whatever else answers meanwhile."""

    reference: str
    digest: str


@dataclass
class _Refused:
    reason: str
    until: float


@dataclass
class Fleet:
    """`step` makes what is up follow what is wanted; `traffic` is who answers now. Both for one thread."""

    wanted: Sequence[Wanted]
    config: ServeConfig
    store: ModelStore
    searched: Searched | None = None
    clock: Callable[[], float] = time.monotonic
    traffic: Traffic = field(default_factory=Traffic)
    _up: dict[str, Version] = field(default_factory=dict)
    """By pinned reference."""
    _pinned: dict[str, str] = field(default_factory=dict)
    """What each wanted reference was, when last it came up."""
    _refused: dict[str, _Refused] = field(default_factory=dict)
    """By pinned reference."""
    _without_copies: dict[str, float] = field(default_factory=dict)
    """Since when applications that answer have had none."""
    _leaving: dict[str, float] = field(default_factory=dict)
    """When applications that get no more requests are taken down."""

    def resume(self, traffic: Traffic) -> None:
        """Go on from what answers, as a keeper that was lost left it."""
        for wanted, slot in ((one, traffic.slot(one.name)) for one in self.wanted):
            for reference, share in zip(wanted.references, slot.shares if slot else (), strict=False):
                self._up[share.version.reference], self._pinned[reference] = share.version, share.version.reference
        if self.searched is not None and traffic.searched is not None:
            self._up[traffic.searched.reference] = traffic.searched
        self.traffic = traffic

    def step(self) -> None:
        """Look every reference up; bring up what is new, retire what nobody asks."""
        slots = tuple(self._slot(wanted) for wanted in self.wanted)
        searched, there = self._searching(), ray.serve.status().applications
        self.traffic = Traffic(slots=self._looked_at(slots, there), searched=searched)
        self._retire(_of_versions(there))

    def _looked_at(self, slots: Sequence[Slot], there: Mapping[str, ApplicationStatusOverview]) -> tuple[Slot, ...]:
        """Those of them whose versions have had no copy for longer than a request waits for one are lost, and go on as they are: Serve
        starts copies anew, and requests find them."""
        now = self.clock()
        found = {share.version.application: share.version.reference for slot in slots for share in slot.shares}
        missing = {name: reason for name in found if (reason := without_copies(there.get(name))) is not None}
        self._without_copies = {name: self._without_copies.get(name, now) for name in missing}
        lost = {name for name, since in self._without_copies.items() if now - since > self.config.bounds.request_timeout_s}
        return tuple(_marked(slot, {name: f"{found[name]}: {missing[name]}" for name in lost}) for slot in slots)

    def _slot(self, wanted: Wanted) -> Slot:
        """Who answers for a model. A canary that is not up leaves all to the other; alone it answers nothing."""
        version, refused = self._current(wanted.reference)
        if wanted.canary is None or version is None:
            shares = [Share(version=version, percent=100)] if version else []
            return Slot(name=wanted.name, shares=tuple(shares), refused=refused)
        canary, reason = self._current(wanted.canary)
        reasons = "; ".join(filter(None, (refused, reason))) or None
        if canary is None or canary == version:
            return Slot(name=wanted.name, shares=(Share(version=version, percent=100),), refused=reasons)
        shares = [Share(version=version, percent=100 - wanted.percent), Share(version=canary, percent=wanted.percent)]
        return Slot(name=wanted.name, shares=tuple(shares), refused=reasons)

    def _current(self, reference: str) -> tuple[Version | None, str | None]:
        """What answers for a reference, and why that is not what it means now."""
        before = self._up.get(self._pinned.get(reference, ""))
        try:
            pinned = self.store.pin(reference)
        except MMError as error:
            return before, f"{reference} cannot be looked up: {error}"
        refused = self._refused.get(pinned)
        if pinned not in self._up and refused is not None and self.clock() < refused.until:
            return before, refused.reason
        if pinned not in self._up:
            started = self.clock()
            try:
                self._up[pinned] = bring_up(pinned, self.config, self.store)
            except MMError as error:
                reason = f"{pinned}: {' '.join(str(error).split())}"[:_MAX_REASON]
                logger.warning("a version is refused: %s", reason)
                took_s = self.clock() - started  # that nothing else was followed: the next try leaves at least as long to the others
                self._refused[pinned] = _Refused(reason, self.clock() + max(_TRY_AGAIN_S, took_s))
                return before, reason
        self._refused.pop(pinned, None)
        self._pinned[reference] = pinned
        return self._up[pinned], None

    def _searching(self) -> Version | None:
        """The version that the index was made with, which may be one that answers anyway."""
        if self.searched is None:
            return None
        found = next((version for version in self._up.values() if version.facts.digest == self.searched.digest), None)
        if found is None:
            found, _ = self._current(self.searched.reference)
        return found if found is not None and found.facts.digest == self.searched.digest else None

    def _retire(self, there: set[str]) -> None:
        """Take down what gets no requests, once those that it had are over: no request lives longer than its bound."""
        answering = {share.version.application for slot in self.traffic.slots for share in slot.shares}
        answering |= {self.traffic.searched.application} if self.traffic.searched else set()
        for application in there - answering:
            leaves = self._leaving.setdefault(application, self.clock() + self.config.bounds.request_timeout_s + 2)
            if self.clock() >= leaves:
                ray.serve.delete(application)
                del self._leaving[application]
                self._up = {pinned: version for pinned, version in self._up.items() if version.application != application}
        self._leaving = {application: leaves for application, leaves in self._leaving.items() if application not in answering}


def _marked(slot: Slot, lost: Mapping[str, str]) -> Slot:
    """`lost`: application → what is wrong with it."""
    reasons = [lost[share.version.application] for share in slot.shares if share.version.application in lost]
    if not reasons:
        return slot
    refused = "; ".join(filter(None, (slot.refused, *reasons)))[:_MAX_REASON]
    return slot.model_copy(update={"refused": refused, "is_lost": len(reasons) == len(slot.shares)})


def without_copies(application: ApplicationStatusOverview | None) -> str | None:
    """What Serve says of an application one of whose parts has no copy that runs; None where all have."""
    if application is None:
        return "its application is gone"
    for name, part in application.deployments.items():
        if not part.replica_states.get(ReplicaState.RUNNING, 0):
            return f"no copy of {name} runs: {' '.join(part.message.split()) or part.status.value}"
    return None


def versions_there() -> set[str]:
    """Applications of versions, by whomever they were brought up."""
    return _of_versions(ray.serve.status().applications)


def _of_versions(applications: Iterable[str]) -> set[str]:
    return {name for name in applications if name.startswith(f"{APPLICATION}-")}


def bring_up(pinned: str, config: ServeConfig, store: ModelStore) -> Version:
    """A version as an application that has answered the canned query.

    Raises:
        ServiceError: it did not come up, in time or at all, or answered no sense; nothing of it is left.
    """
    application = application_of(pinned)
    try:
        target = RunTarget(build_version(pinned, config, store), name=application, route_prefix=None)
        (handle,) = ray.serve.run_many([target], wait_for_applications_running=False)
        _await_running(application, config.compute.start_timeout_s)
        facts = handle.probe.remote().result(timeout_s=_PROBE_TIMEOUT_S)
    except Exception as error:  # whatever a model raises while it loads or answers comes out here, wrapped in Ray's own
        reason = _reason(application) or _last_line(error)
        ray.serve.delete(application)
        raise ServiceError(reason) from None
    return Version(application=application, reference=pinned, facts=facts)


def _await_running(application: str, timeout_s: float) -> None:
    """`ray.serve.run` waits for ever where there is no room, and with it everything else that is to be kept up.

    Raises:
        ServiceError: it failed, or does not run in time, and what Serve says of that.
    """
    give_up = time.monotonic() + timeout_s
    while (found := ray.serve.status().applications[application]).status is not ApplicationStatus.RUNNING:
        if found.status is ApplicationStatus.DEPLOY_FAILED:
            raise ServiceError(found.message)
        if time.monotonic() >= give_up:
            told = " ".join(" ".join(one.message.split()) for one in found.deployments.values() if one.message)
            raise ServiceError(f"not up within {timeout_s:g} s (compute.start_timeout_s): {told or 'Serve does not say why'}")
        time.sleep(_LOOK_EVERY_S)


def application_of(pinned: str) -> str:
    """The name of a version's application."""
    return f"{APPLICATION}-{hashlib.blake2b(pinned.encode(), digest_size=6).hexdigest()}"


def build_version(pinned: str, config: ServeConfig, store: ModelStore) -> ray.serve.Application:
    """The model, behind what prepares its inputs."""
    compute, bounds = config.compute, config.bounds
    at_a_time = bounds.max_requests * config.gateways + compute.max_batch_size
    encoder = (
        ray.serve.deployment(Encoder)
        .options(
            num_replicas=compute.replicas,
            max_ongoing_requests=at_a_time,
            max_constructor_retry_count=1,
            ray_actor_options={"num_cpus": _ENCODER_CPUS, "num_gpus": compute.gpus_per_replica},
        )
        .bind(pinned, compute, store)
    )
    preparer = ray.serve.deployment(Preparer).options(
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": compute.max_preparers,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 2,
            "downscale_delay_s": 60,
        },
        max_ongoing_requests=at_a_time,
        ray_actor_options={"num_cpus": _PREPARER_CPUS},
    )
    return preparer.bind(encoder, bounds.max_pixels)


def _reason(application: str) -> str | None:
    """What Serve kept of a failed constructor: the last line of its traceback."""
    found = ray.serve.status().applications.get(application)
    messages = [deployment.message for deployment in found.deployments.values() if deployment.message] if found else []
    errors = [line for message in messages for line in message.splitlines() if "Error" in line and not line.startswith(" ")]
    return errors[-1].removeprefix("mm_core.errors.") if errors else None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("mm_core.errors.") if lines else repr(error)

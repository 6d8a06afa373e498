"""What is served, whether it answers, and the numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Response

from serve.measured import MEDIA_TYPE
from serve.problems import RESPONSES, InputError
from serve.schema import Health, ModelCard, ModelList, ModelState, Readiness, VersionCard
from serve.tasks import endpoints_of
from serve.traffic import Share, Slot

if TYPE_CHECKING:
    from serve.app import Desk


def attach_status(app: FastAPI, desk: Desk, *, searchable: bool) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """The process that speaks HTTP is alive."""
        return Health()

    @app.get("/readyz", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Whether every model has a version that answers; of one that should and does not, why."""
        states = [
            ModelState(name=slot.name, answers={s.version.reference: s.percent for s in slot.shares}, refused=slot.refused)
            for slot in desk.upstream.traffic.slots
        ]
        if desk.upstream.traffic.is_ready:
            return Readiness(status="ready", models=states)
        response.status_code = 503
        failed = any(slot.is_lost or (slot.refused and not slot.shares) for slot in desk.upstream.traffic.slots)
        return Readiness(status="failed" if failed else "starting", models=states)

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> ModelList:
        """The models there are, their versions and what they answer."""
        return ModelList(data=[_card(slot, desk, searchable) for slot in desk.upstream.traffic.slots])

    @app.get("/v1/models/{name:path}", responses=RESPONSES)
    async def model(name: str) -> ModelCard:
        """One of them."""
        slot = desk.upstream.traffic.slot(name)
        if slot is None:
            raise InputError(f"model: {name[:100]!r} is not served here", 404)
        return _card(slot, desk, searchable)

    @app.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}}
    )
    async def metrics() -> Response:
        """The gateway's numbers, for Prometheus."""
        return Response(desk.upstream.measured.page(), media_type=MEDIA_TYPE)


def _card(slot: Slot, desk: Desk, searchable: bool) -> ModelCard:
    found = endpoints_of(share.version.facts.task for share in slot.shares)
    if not searchable:
        found = [name for name in found if name != "search"]
    label_sets = sorted(desk.config.label_sets) if "classify" in found else []
    return ModelCard(id=slot.name, endpoints=found, label_sets=label_sets, versions=[_version(share) for share in slot.shares])


def _version(share: Share) -> VersionCard:
    facts = share.version.facts
    return VersionCard(
        version=share.version.reference,
        percent=share.percent,
        digest=facts.digest,
        task=facts.task,
        dimensions=facts.embed_dim,
        fused_dimensions=facts.fused_dim,
        image_size=facts.image_size,
        context_length=facts.context_length,
        parameters=facts.parameters,
        logit_scale=facts.logit_scale,
        recipe=facts.recipe,
        data_fingerprint=facts.data_fingerprint,
        metrics=facts.metrics,
        card=facts.card,
    )

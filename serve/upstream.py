"""The models as a gateway sees them: who answers, how many inputs wait, and what to do where a copy is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

import ray.serve
from ray.serve.handle import DeploymentHandle

from mm_core.config import nearest
from serve.config import ServeConfig
from serve.encoded import Encoded, Matched
from serve.facts import Version
from serve.inputs import Picture
from serve.joined import Joined
from serve.measured import Measured
from serve.prepare import Unreadable
from serve.problems import InputError, OverloadedError, UnavailableError, is_lost
from serve.traffic import NOBODY, Slot, Traffic, pick

_PAUSE_S = 0.05
"""Before a request that a lost copy took is given to another."""

_GROUPS = 2
"""Of joined requests under way for each copy of a model, one computed while one is prepared; and as many more."""

Part = Literal["encode", "fuse", "match"]
"""What is wanted: a method of the encoder."""
PARTS: tuple[Part, ...] = get_args(Part)
T = TypeVar("T")
Ask = Callable[[str, Part, Sequence[str | Picture]], Awaitable[Encoded | Matched | Unreadable]]
"""Of an application: what its model makes of inputs."""


class Upstream:
    """All models of one gateway."""

    def __init__(self, max_waiting_inputs: int, measured: Measured, ask: Ask) -> None:
        self._max_waiting, self.measured, self._ask = max_waiting_inputs, measured, ask
        self._waiting = 0
        self.traffic = NOBODY

    def follow(self, traffic: Traffic) -> None:
        """From now on."""
        self.traffic = traffic
        self.measured.traffic(traffic)

    def choose(self, name: str | None, session: str) -> tuple[str, Version]:
        """The served model's name, and the version of it that answers.

        Raises:
            InputError: no model of this name is served.
            UnavailableError: no version of it is up yet.
        """
        slot = self.traffic.slot(name)
        if slot is None and self.traffic.slots:
            names = [slot.name for slot in self.traffic.slots]
            raise InputError(f"model: {str(name)[:100]!r} is not served here{nearest(str(name)[:100], names)}", 404)
        if slot is None or not slot.shares:
            raise UnavailableError(_why_not(slot))
        return slot.name, pick(slot, session)

    async def encode(self, model: str, version: Version, inputs: Sequence[str | Picture], names: Sequence[str]) -> Encoded:
        """
        Args:
            names: of the inputs, for messages.

        Raises:
            InputError: a picture that cannot be read.
            OverloadedError: too many inputs wait.
        """
        result = await self._asked(model, version, "encode", inputs, names)
        assert isinstance(result, Encoded)
        self.measured.encoded(model, version.reference, ["text" if isinstance(one, str) else "image" for one in inputs], result)
        return result

    async def fuse(self, model: str, version: Version, inputs: Sequence[str | Picture], names: Sequence[str]) -> Encoded:
        """Of a model with a fusion: the first picture with the first text, and so on.

        Raises:
            InputError, OverloadedError: as `encode`.
        """
        result = await self._asked(model, version, "fuse", inputs, names)
        assert isinstance(result, Encoded)
        self.measured.encoded(model, version.reference, ["pair"] * len(result.norms), result)
        return result

    async def match(self, model: str, version: Version, inputs: Sequence[str | Picture], names: Sequence[str]) -> Matched:
        """Pictures with texts, of a model that reads both at once.

        Raises:
            InputError, OverloadedError: as `encode`.
        """
        result = await self._asked(model, version, "match", inputs, names)
        assert isinstance(result, Matched)
        return result

    async def _asked(
        self, model: str, version: Version, part: Part, inputs: Sequence[str | Picture], names: Sequence[str]
    ) -> Encoded | Matched:
        with self._counted(len(inputs)):
            result = await self.again_if_lost(model, lambda: self._ask(version.application, part, inputs))
        if isinstance(result, Unreadable):
            raise InputError(f"{names[result.position]}: {result.problem}")
        return result

    async def again_if_lost(self, model: str, ask: Callable[[], Awaitable[T]]) -> T:
        """What a lost copy was asked is asked of another, once."""
        try:
            return await ask()
        except Exception as error:
            if not is_lost(error):
                raise
            self.measured.lost(model)
            await asyncio.sleep(_PAUSE_S)
            return await ask()

    @contextmanager
    def _counted(self, inputs: int) -> Iterator[None]:
        """One request alone may have more than the bound, which is for those that come together."""
        if self._waiting and self._waiting + inputs > self._max_waiting:
            raise OverloadedError(f"{self._waiting:,} inputs are being computed")
        self._waiting += inputs
        self.measured.waiting.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= inputs
            self.measured.waiting.set(self._waiting)


_Way = dict[Part, Joined[Encoded | Matched | Unreadable]]
"""To one version."""


class Handles:
    """The way to the deployments of versions, by application."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._found: dict[str, _Way] = {}

    async def ask(self, application: str, part: Part, inputs: Sequence[str | Picture]) -> Encoded | Matched | Unreadable:
        way = self._found.get(application) or await self._look_up(application)
        return await way[part].ask(inputs)

    async def keep(self, applications: set[str]) -> None:
        """Know these and no others."""
        self._found = {name: way for name, way in self._found.items() if name in applications}
        for name in applications - set(self._found):
            await self._look_up(name)

    async def _look_up(self, application: str) -> _Way:
        def both() -> tuple[DeploymentHandle, DeploymentHandle]:
            return ray.serve.get_deployment_handle("Preparer", application), ray.serve.get_deployment_handle("Encoder", application)

        preparer, encoder = await asyncio.get_running_loop().run_in_executor(None, both)
        compute, timeout_s = self._config.compute, self._config.bounds.request_timeout_s

        def joined(part: Part) -> Joined[Encoded | Matched | Unreadable]:
            """What is prepared goes from the preparer to the encoder without coming here."""

            async def send(requests: list[Sequence[str | Picture]]) -> list[Encoded | Matched | Unreadable]:
                answers: list[Encoded | Matched | Unreadable] = await getattr(encoder, part).remote(preparer.prepare.remote(requests))
                return answers

            return Joined(send, compute.max_batch_size, _GROUPS * compute.replicas + _GROUPS, timeout_s)

        self._found[application] = {part: joined(part) for part in PARTS}
        return self._found[application]


def _why_not(slot: Slot | None) -> str:
    reason = slot.refused if slot else None
    return f"no version is up: {reason}" if reason else "the model is being started; try again shortly"

"""Large batches in the memory of small ones (GradCache: Gao et al. 2021, arXiv 2101.06983), for any objective.

A batch goes through the model in pieces, once without gradients to get its features, which are small; the objective gives the gradient of
the loss by each feature; then every piece goes through again and is back-propagated from there. The gradient is that of the whole batch,
because all features were there when the loss was computed. It costs a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mm_core.objectives.output import LossOutput
from mm_core.training.parallel import Parallel

Batch = TypeVar("Batch")


def pieces_for(counts: Sequence[int], micro_batch_size: int) -> int:
    """Into how many pieces every rank divides its share: equally many, as sharded models exchange weights at each."""
    return min(-(-max(counts) // micro_batch_size), min(counts))


def cached_backward(
    model: Parallel,
    batch: Batch,
    objective: Callable[[Any], LossOutput],
    pieces: int,
    *,
    forward: Callable[[], AbstractContextManager[object]],
) -> LossOutput:
    """Forward and backward of `objective(model(batch))`, leaving the gradients in the parameters.

    Args:
        batch: a dataclass of tensors whose first axis is the samples.
        objective: of the model's output, a dataclass of tensors: scalars, or with the samples as first axis.
        forward: entered around each call of the model; for autocast.
    """
    parts = split_batch(batch, pieces)
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            with forward():
                outputs.append(model(part))
    whole = joined_output(outputs)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in _tensors(whole).items()}
    loss = objective(replace(whole, **leaves))
    gradients = torch.autograd.grad(loss.total, [*leaves.values()], allow_unused=True)
    by_part = _shared_out({name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}, [*map(_samples, outputs)])
    for number, (part, state, wanted) in enumerate(zip(parts, states, by_part, strict=True), 1):
        _restore(state)  # what the first pass dropped, this one drops
        with model.gradients_stay_local(number < pieces):
            with forward():
                output = _tensors(model(part))
            trained = [name for name in wanted if output[name].requires_grad]  # a frozen tower's are not
            torch.autograd.backward([output[name] for name in trained], [wanted[name] for name in trained])
    return loss


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """A dataclass of tensors whose first axis is the samples, in so many parts."""
    divided = {name: tensor.tensor_split(pieces) for name, tensor in _tensors(batch).items()}
    return [replace(batch, **{name: parts[i] for name, parts in divided.items()}) for i in range(pieces)]  # type: ignore[type-var]


def _tensors(values: Any) -> dict[str, Tensor]:
    return {field.name: value for field in fields(values) if isinstance(value := getattr(values, field.name), Tensor)}


def _samples(output: Any) -> int:
    return next(len(tensor) for tensor in _tensors(output).values() if tensor.ndim)


def joined_output(outputs: Sequence[Any]) -> Any:
    """One output of all pieces; what has no samples is the same in each."""
    parts = [_tensors(output) for output in outputs]
    whole = {name: torch.cat([part[name] for part in parts]) if first.ndim else first for name, first in parts[0].items()}
    return replace(outputs[0], **whole)


def _shared_out(gradients: dict[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """Each piece's part; what has no samples goes with the last, with which gradients are exchanged."""
    divided = {name: gradient.split([*sizes]) for name, gradient in gradients.items() if gradient.ndim}
    shared = {name: gradient for name, gradient in gradients.items() if not gradient.ndim}
    pieces = [{name: parts[i] for name, parts in divided.items()} for i in range(len(sizes))]
    return [*pieces[:-1], pieces[-1] | shared]


_State = tuple[Tensor, Tensor | None]


def _random_state() -> _State:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])

"""A FLAVA run that stops after any step, also before the first of a kind, goes on bit for bit: losses and weights, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from mm_core.config import resolve
from mm_core.data.ledger import Source
from mm_core.data.reader import PlanReader, ReadSpec
from mm_core.models.codebook import CodebookSizes, codebook_settings
from mm_core.models.family import build_model, resolved
from mm_core.models.tokenizer import caption_tokenizer, special_tokens, train_bpe
from mm_core.training.checkpoint import checkpoint_writer, load_checkpoint, seed_step, whole_state
from mm_core.training.clock import StepClock
from mm_core.training.step import TrainStep
from mm_core.training.transfer import Transfer
from pipelines.batches import Share, steps_of
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.loop import build_step
from pipelines.train.parts import inputs_of, wrapped
from pipelines.train.preflight import masking_for, named_weights
from pipelines.train.run_data import RunData

pytestmark = pytest.mark.usefixtures("ray_cluster")

CPU, STEPS, TOWER = torch.device("cpu"), 9, "{width: 16, layers: 1, heads: 2}"


class Runner:
    """The parts of a run, made anew each time."""

    def __init__(self, folder: Path, data: RunData) -> None:
        sizes = CodebookSizes(width=4, blocks_per_group=1, entries=12)
        FlavaImageCodebook(FlavaImageCodebookConfig(**codebook_settings(sizes))).save_pretrained(folder / "book")
        small = [f"model.vision={TOWER}", f"model.text={TOWER}", f"model.fusion={TOWER}", "model.image_size=32", "precision=fp32"]
        settings = [*small, f"model.codebook_source={folder / 'book'}", f"steps={STEPS}", "global_batch_size=16", "data.chunk=8"]
        run: TrainRun = resolve(recipe("flava-tiny"), environment={}, overrides=[*settings, "data.mix.weights=[1,1,1]"])[0]
        self._tokenizer = train_bpe(data.captions(500), vocab_size=320, context_length=32)
        model = resolved(run.model).model_copy(update={"vocab_size": len(self._tokenizer)})
        self.run = run.model_copy(update={"model": model})
        masking = masking_for(self.run, self._tokenizer)
        light = caption_tokenizer(self._tokenizer, 32)
        self._spec = ReadSpec(data.sources, data.plan(self.run), 32, self.run.data.augment, light, masking=masking)

    def fresh(self) -> tuple[torch.nn.Module, TrainStep]:
        model = wrapped(self.run, build_model(self.run.model, special_tokens(self._tokenizer)))
        weights, _ = named_weights(self.run, self._tokenizer)
        assert weights is not None, "the codebook's"
        model.model.load_state_dict(weights)
        return model, build_step(self.run, model, StepClock(CPU))

    def steps(self, step: TrainStep, first: int, last: int) -> list[dict[str, float]]:
        reader, share, inputs = PlanReader(self._spec), Share(0, 1, 2), inputs_of(self.run, [16], 0)
        losses = []
        for number in range(first, last):
            (batch,) = steps_of(self._spec, share, iter([reader.read(share.positions(number, 8))]), number)
            seed_step(self.run.seed, number, 0)
            losses.append({name: float(term) for name, term in step(inputs(batch, Transfer(CPU)), number).terms.items()})
        return losses


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_it_goes_on_from_any_step_bit_for_bit(process_group: None, corpus: Path, tmp_path: Path) -> None:
    kinds = {"pairs": ("image", "text"), "images": ("image",), "texts": ("text",)}
    indexes = [build_index([str(corpus / "train")], str(tmp_path / name), need=need) for name, need in kinds.items()]
    runner = Runner(tmp_path, RunData.open([Source(index=index.url) for index in indexes]))
    whole_model, step = runner.fresh()
    whole = runner.steps(step, 0, STEPS)
    assert len({tuple(losses) for losses in whole[:3]}) == 3  # a step of each kind
    for cut in (1, 2, 4):
        model, step = runner.fresh()
        first = runner.steps(step, 0, cut)
        url = str(tmp_path / f"cut{cut}")
        state_dict_saver.save(whole_state(model, step.optimizer), storage_writer=checkpoint_writer(url))
        again, step = runner.fresh()
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(1)
        load_checkpoint(url, again, step.optimizer)
        assert first + runner.steps(step, cut, STEPS) == whole
        assert all(torch.equal(a, b) for a, b in zip(whole_model.parameters(), again.parameters(), strict=True))

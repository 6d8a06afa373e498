"""Two towers and a fusion as training calls them: what a step has of images and texts in, features and predictions out.

The wrapped `FlavaForPreTraining` is the model, so what is exported loads with its `from_pretrained`, and with `FlavaModel`'s. Its forward
is not: it computes every loss from one rank's batch alone, and waits for the device at each. Its parts are called here one by one.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from mm_core.distributed import GlobalBatch, gather_rows
from mm_core.losses.negatives import Negatives, draw_negatives, text_keys
from mm_core.models.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from mm_core.models.codebook import CODEBOOK_STRIDE, codebook_pixels
from mm_core.models.fused_batch import (
    FusedBatch,
    FusedOutput,
    ImageBatch,
    MaskedImages,
    MaskedTexts,
    PairBatch,
    Predictions,
    Task,
    TextBatch,
)
from mm_core.models.hallucination import HALLUCINATION, Hallucination
from mm_core.models.patch_product import multiply_patches
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD
from mm_core.models.two_tower import ImageTextBatch, TwoTowerOutput, normalise, unit

if TYPE_CHECKING:
    from transformers import FlavaForPreTraining

ALL_TASKS = frozenset(Task)
_IMAGE_FIRST = 2
"""Of the fusion's tokens the first patch: before it are its own class token and the image's."""


class _States(NamedTuple):
    """What a tower gives."""

    hidden: Float[Tensor, "b n d"]
    """Before the last normalisation: what the fusion takes (as transformers' `FlavaModel` hands it on)."""
    embedded: Float[Tensor, "b n d"]
    """After it: what heads and projections take."""


class _Shown(NamedTuple):
    """What the fusion is shown of pairs."""

    image: Float[Tensor, "b n d"]
    text: Float[Tensor, "b l d"]
    present: Bool[Tensor, "b l"]
    """Where a text has words."""
    seen: Bool[Tensor, "b 2"]
    """Which of image and text it may look at."""


class Fused(nn.Module):
    """A model of two towers whose tokens meet in a third transformer."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: FlavaForPreTraining,
        *,
        mean: tuple[float, ...] = OPENAI_MEAN,
        std: tuple[float, ...] = OPENAI_STD,
        tasks: frozenset[Task] = ALL_TASKS,
        hard_negatives: float = 1.0,
        learns_balance: bool = False,
        hallucination: Hallucination | None = None,
    ) -> None:
        """
        Args:
            tasks: what is predicted in training; what serves none of them is not computed.
            hard_negatives: share of the negatives of `Task.ITM` that are drawn by similarity; without `Task.CONTRASTIVE` there is none.
            learns_balance: each task has a scalar parameter, for weights that are learned. They are not exported.
            hallucination: what stands in for a missing side; None: nothing does.
        """
        super().__init__()
        self.model = model
        multiply_patches(model)
        self._tasks, self._hard_negatives = tasks, hard_negatives
        self.hallucination = hallucination
        learned = sorted(tasks) if learns_balance else []
        self.balance = nn.ParameterDict({task.value: nn.Parameter(torch.zeros(())) for task in learned})
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    # Training.

    def forward(self, batch: FusedBatch | ImageTextBatch) -> FusedOutput | TwoTowerOutput:
        """Of an `ImageTextBatch`, as evaluation gives it, the features alone."""
        match batch:
            case ImageBatch():
                return self._weighted(self._of_images(batch.images))
            case TextBatch():
                return self._weighted(self._of_texts(batch.texts))
            case PairBatch():
                return self._weighted(self._of_pairs(batch))
            case ImageTextBatch():
                views = self.image_features(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
                captions = self.text_features(batch.input_ids.flatten(0, 1)).unflatten(0, batch.input_ids.shape[:2])
                return TwoTowerOutput(views, captions, self.logit_scale)

    def _weighted(self, output: FusedOutput) -> FusedOutput:
        there = {*output.predictions, *([Task.CONTRASTIVE] if output.image_features is not None else [])}
        # Clones: of an output that is a parameter itself DDP does not see that it is used.
        return replace(output, balance={task: self.balance[task.value].clone() for task in there if task.value in self.balance})

    def _of_images(self, images: MaskedImages) -> FusedOutput:
        if Task.MIM not in self._tasks:
            return FusedOutput()
        states = self._image(images.pixels, images.mask).embedded
        logits = self.model.mim_head(_places(states, images.rows, images.mask.shape[1], first=1))
        return FusedOutput({Task.MIM: Predictions(logits, self._entries(images))})

    def _of_texts(self, texts: MaskedTexts) -> FusedOutput:
        if Task.MLM not in self._tasks:
            return FusedOutput()
        states = self._text(texts.masked_ids).embedded
        logits = self.model.mlm_head(_places(states, texts.rows, texts.input_ids.shape[1], first=0))
        return FusedOutput({Task.MLM: Predictions(logits, _tokens(texts))})

    def _of_pairs(self, batch: PairBatch) -> FusedOutput:
        """The whole images and the masked ones go through their tower together, and so do the texts."""
        contrasted, whole = Task.CONTRASTIVE in self._tasks, bool(self._tasks & {Task.CONTRASTIVE, Task.ITM})
        masked = bool(self._tasks & {Task.MMM_IMAGE, Task.MMM_TEXT})
        images, texts = batch.images, batch.texts
        masks = [torch.zeros_like(images.mask)] * whole + [images.mask] * masked
        ids = [texts.input_ids] * whole + [texts.masked_ids] * masked
        if not masks:
            return FusedOutput()
        image = self._image(images.pixels.repeat(len(masks), 1, 1, 1), torch.cat(masks))
        text = self._text(torch.cat(ids))
        count = len(images.pixels)
        features: tuple[Tensor, Tensor] | None = None
        if contrasted:
            features = unit(self._image_projected(image.embedded[:count])), unit(self._text_projected(text.embedded[:count]))
        output = FusedOutput(self._fused(batch, image, text, features), tokens=(image.hidden, text.hidden) if batch.probed else ())
        if self.hallucination is not None:
            output = replace(output, guessed=self.hallucination(image.embedded[:count, 0], text.embedded[:count, 0]))
        if features is None:
            return output
        return replace(output, image_features=features[0], text_features=features[1], logit_scale=self.logit_scale)

    def _fused(self, batch: PairBatch, image: _States, text: _States, features: tuple[Tensor, Tensor] | None) -> dict[Task, Predictions]:
        """`image`, `text`: of the whole sides, then of the masked ones, as far as they serve a task. All go through the fusion together."""
        images, texts, count = batch.images, batch.texts, len(batch.images.pixels)
        everything = images.mask.new_ones(count, 2)
        shown: list[_Shown] = []
        negatives = stand_in = None
        if Task.ITM in self._tasks:
            negatives, other, other_present = self._negatives(batch, text.hidden[:count], features)
            shown.append(_Shown(image.hidden[:count], text.hidden[:count], self._is_text(texts.input_ids), everything))
            shown.append(_Shown(image.hidden[:count], other, other_present, everything))
        if self._tasks & {Task.MMM_IMAGE, Task.MMM_TEXT}:
            seen = everything if batch.seen is None else batch.seen
            if self.hallucination is not None:
                stand_in = self.hallucination.of_either(image.embedded[-count:, 0], text.embedded[-count:, 0], seen)
            shown.append(_Shown(image.hidden[-count:], text.hidden[-count:], self._is_text(texts.masked_ids), seen))
        if not shown:
            return {}
        together = _Shown(*(torch.cat(part) for part in zip(*shown, strict=True)))
        extra = None
        if stand_in is not None:  # of the masked pairs, which come last: whole ones lack nothing
            extra = functional.pad(stand_in, (0, 0, len(together.seen) - count, 0)), ~together.seen.all(dim=1)
        states = self._fuse(together.image, together.text, together.present & together.seen[:, 1:], together.seen[:, 0], extra)
        found: dict[Task, Predictions] = {}
        if negatives is not None:
            labels = torch.arange(2, device=states.device).flip(0).repeat_interleave(count)
            counts = torch.cat([torch.ones_like(negatives.found), negatives.found])
            found[Task.ITM] = Predictions(self.model.itm_head(states[: 2 * count]), labels, counts)
        pairs, patches = states[-count:], images.mask.shape[1]
        if Task.MMM_IMAGE in self._tasks:
            masked = _places(pairs, images.rows, patches, first=_IMAGE_FIRST)
            found[Task.MMM_IMAGE] = Predictions(self.model.mmm_image_head(masked), self._entries(images))
        if Task.MMM_TEXT in self._tasks:
            masked = _places(pairs, texts.rows, texts.input_ids.shape[1], first=_IMAGE_FIRST + patches)
            found[Task.MMM_TEXT] = Predictions(self.model.mmm_text_head(masked), _tokens(texts))
        return found

    def _negatives(
        self, batch: PairBatch, text: Float[Tensor, "b l d"], features: tuple[Tensor, Tensor] | None
    ) -> tuple[Negatives, Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        """A text of the global batch for each image, encoded, and where it has words.

        Args:
            text: the rank's own texts, whole. Of another rank token ids are sent, which are small, and encoded again: the gradient is
                the same.
        """
        whole, ids = batch.whole, batch.texts.input_ids
        with torch.no_grad():
            keys = gather_rows(text_keys(ids), whole.counts)
            own = torch.arange(whole.first, whole.first + len(ids), device=ids.device)
            similarities = self._similarities(features, whole, len(ids))
            negatives = draw_negatives(similarities, own, keys, batch.draws, hard=self._hard_negatives)
        if not whole.is_divided and not batch.probed:  # what is probed are the pairs' own tokens, on any number of ranks
            return negatives, text[negatives.rows], self._is_text(ids[negatives.rows])
        theirs = gather_rows(ids, whole.counts)[negatives.rows]
        return negatives, self._text(theirs).hidden, self._is_text(theirs)

    def _similarities(self, features: tuple[Tensor, Tensor] | None, whole: GlobalBatch, count: int) -> Float[Tensor, "b n"]:
        if features is None:
            return self.mean.new_zeros(count, sum(whole.counts))
        image, text = features
        return self.logit_scale * image @ gather_rows(text, whole.counts).T

    @torch.no_grad()
    def _entries(self, images: MaskedImages) -> Int[Tensor, " m"]:
        """Of the codebook, at the masked patches. What is to be predicted does not depend on the step's precision."""
        size = CODEBOOK_STRIDE * round(images.mask.shape[1] ** 0.5)
        pixels = codebook_pixels(images.pixels, size).to(self.mean.dtype)
        # The meta device, on which costs are counted, knows no autocast.
        with nullcontext() if pixels.is_meta else torch.autocast(pixels.device.type, enabled=False):
            return self.model.image_codebook.get_codebook_indices(pixels).flatten()[images.rows]

    # The parts.

    def _image(self, images: UInt8[Tensor, "b h w 3"], mask: Bool[Tensor, "b n"] | None = None) -> _States:
        pixels = normalise(images, self.mean, self.std)
        output = self.model.flava.image_model(pixel_values=pixels, bool_masked_pos=mask, output_hidden_states=True, return_dict=True)
        return _States(output.hidden_states[-1], output.last_hidden_state)

    def _text(self, input_ids: Int[Tensor, "b l"]) -> _States:
        mask = self._mask(self._is_text(input_ids))
        output = self.model.flava.text_model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, return_dict=True)
        return _States(output.hidden_states[-1], output.last_hidden_state)

    def _fuse(
        self,
        image: Float[Tensor, "b n d"] | None,
        text: Float[Tensor, "b l d"] | None,
        present: Bool[Tensor, "b l"] | None,
        seen: Bool[Tensor, " b"] | None = None,
        extra: tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """Class token, the image's tokens, the text's; of one modality alone its own.

        Args:
            present: which of the text's tokens it may look at.
            seen: of which samples the image's; None for all.
            extra: one more token, last, and of which samples it may look at it.
        """
        flava, tokens, masks = self.model.flava, [], []
        if image is not None:
            tokens.append(flava.image_to_mm_projection(image))
            masks.append(self.mean.new_ones(image.shape[:2], dtype=torch.bool) if seen is None else seen[:, None].expand(image.shape[:2]))
        if text is not None:
            assert present is not None, "a text has padding"
            tokens.append(flava.text_to_mm_projection(text))
            masks.append(present)
        if extra is not None:
            tokens.append(extra[0][:, None].to(tokens[0].dtype))
            masks.append(extra[1][:, None])
        mask = self._mask(torch.cat([masks[0].new_ones(len(masks[0]), 1), *masks], dim=1))
        return flava.multimodal_model(torch.cat(tokens, dim=1), attention_mask=mask, return_dict=True).last_hidden_state

    def _is_text(self, input_ids: Int[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        return input_ids != self.model.config.text_config.pad_token_id

    def _mask(self, seen: Bool[Tensor, "b n"]) -> Bool[Tensor, "b 1 1 n"] | Int[Tensor, "b n"]:
        """For SDPA as its kernels take it; transformers would first ask the device whether anything is masked."""
        return seen[:, None, None] if self.model.config.text_config._attn_implementation == "sdpa" else seen.long()

    def _image_projected(self, embedded: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
        return self.model.flava.image_projection(embedded[:, 0])

    def _text_projected(self, embedded: Float[Tensor, "b l d"]) -> Float[Tensor, "b e"]:
        return self.model.flava.text_projection(embedded[:, 0])

    # What evaluation and serving ask.

    def image_features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        return unit(self.image_vectors(images))

    def text_features(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        return unit(self.text_vectors(input_ids))

    def image_vectors(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """As the tower gives them: of any length."""
        return self._image_projected(self._image(images).embedded)

    def text_vectors(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """As the tower gives them: of any length."""
        return self._text_projected(self._text(input_ids).embedded)

    sees_padding = False
    """What is padding is masked."""
    logit_bias = None

    def fused_states(self, images: UInt8[Tensor, "b h w 3"] | None, input_ids: Int[Tensor, "b l"] | None) -> Float[Tensor, "b n d"]:
        """The fusion's tokens, its class token first, of pairs or of one modality."""
        image, head = None if images is None else self._image(images), self.hallucination
        if input_ids is None:
            assert image is not None, "one of both"
            return self._fuse(image.hidden, None, None, extra=None if head is None else _seen_by_all(head.of_image(image.embedded[:, 0])))
        text, present = self._text(input_ids), self._is_text(input_ids)
        if image is None:
            return self._fuse(None, text.hidden, present, extra=None if head is None else _seen_by_all(head.of_text(text.embedded[:, 0])))
        return self._fuse(image.hidden, text.hidden, present)

    def multimodal_features(self, images: UInt8[Tensor, "b h w 3"] | None, input_ids: Int[Tensor, "b l"] | None) -> Float[Tensor, "b d"]:
        """Of pairs, or of images or texts alone; L2-normalised. Not in the space of the towers' own features."""
        return unit(self.multimodal_vectors(images, input_ids))

    def multimodal_vectors(self, images: UInt8[Tensor, "b h w 3"] | None, input_ids: Int[Tensor, "b l"] | None) -> Float[Tensor, "b d"]:
        """As the fusion gives them: of any length."""
        return self.fused_states(images, input_ids)[:, 0]

    def match(self, images: UInt8[Tensor, "b h w 3"], input_ids: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        """The probability that each pair belongs together."""
        return self._matched(self.fused_states(images, input_ids))

    def match_all(self, images: UInt8[Tensor, "n h w 3"], input_ids: Int[Tensor, "m l"], *, at_a_time: int = 64) -> Float[Tensor, "n m"]:
        """`match` of every image with every text. Each goes through its tower once; pairs through the fusion, so many at a time."""
        image, text, present = self._image(images).hidden, self._text(input_ids).hidden, self._is_text(input_ids)
        pairs = torch.cartesian_prod(torch.arange(len(image), device=image.device), torch.arange(len(text), device=text.device))
        scores = [self._matched(self._fuse(image[i], text[t], present[t])) for i, t in (part.unbind(1) for part in pairs.split(at_a_time))]
        return torch.cat(scores).view(len(image), len(text))

    def _matched(self, states: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return self.model.itm_head(states).float().softmax(dim=1)[:, 1]

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.model.flava.logit_scale.exp()

    @property
    def beside(self) -> dict[str, nn.Module]:
        """What a bundle keeps beside the model, by the file's name."""
        return {} if self.hallucination is None else {HALLUCINATION: self.hallucination}

    # What training does to it.

    depends_on_batch = False
    """Features of a sample are the same in any batch."""
    trains_in_parts = True
    """A step of one modality trains no more than its tower."""

    def attend_for(self, device: torch.device) -> None:
        """SDPA everywhere: on a CPU too it is no slower than the eager form that transformers has of this model."""
        self.attend("sdpa")

    def attend(self, implementation: Literal["eager", "sdpa"]) -> None:
        from mm_core.models.flava_attention import attend

        config = self.model.config
        attend(self.model, implementation)
        for part in (config.image_config, config.text_config, config.multimodal_config):
            part._attn_implementation = implementation  # for masks, which are made in another form

    def blocks(self) -> list[nn.Module]:
        return transformer_blocks(self.model)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks. To be called before `checkpoint_activations`."""
        compile_blocks(self.blocks())

    def checkpoint_activations(self) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        checkpoint_blocks(self.blocks())


def _seen_by_all(token: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Bool[Tensor, " b"]]:
    return token, token.new_ones(len(token), dtype=torch.bool)


def _places(states: Float[Tensor, "b n d"], rows: Int[Tensor, " m"], length: int, *, first: int) -> Float[Tensor, "m d"]:
    """The states at `rows` of b x `length`, which begin at `first` in each sample."""
    return states.flatten(0, 1)[rows // length * states.shape[1] + first + rows % length]


def _tokens(texts: MaskedTexts) -> Int[Tensor, " m"]:
    return texts.input_ids.flatten()[texts.rows]

"""A student's similarities drawn towards a teacher's (Hinton et al. 2015; for CLIP: Yang et al. 2024, arXiv 2307.12732, section 3.2)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mm_core.losses.blocks import BLOCK_BYTES, rows_per_block, sum_over_rows


def distillation_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b c d"],
    all_image: Float[Tensor, "B d"],
    all_text: Float[Tensor, "B c d"],
    scale: Float[Tensor, ""],
    teacher_image: Float[Tensor, "b e"],
    teacher_text: Float[Tensor, "b c e"],
    all_teacher_image: Float[Tensor, "B e"],
    all_teacher_text: Float[Tensor, "B c e"],
    teacher_scale: Float[Tensor, ""],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, ""]:
    """This rank's share of the divergence KL(teacher ‖ student) of each row's softmax, both ways; 0 where they agree.

    The arguments are as in `contrastive_loss`; the teacher's width may differ.
    """
    captions = text.shape[1]
    texts, teacher_texts = all_text.flatten(0, 1), all_teacher_text.flatten(0, 1)
    rows = sum_over_rows(
        _divergence,
        (image, teacher_image),
        (texts, scale, teacher_texts, teacher_scale),
        rows_at_a_time=rows_per_block(texts, block_bytes),
    )
    columns = sum_over_rows(
        _divergence,
        (text.flatten(0, 1), teacher_text.flatten(0, 1)),
        (all_image, scale, all_teacher_image, teacher_scale),
        rows_at_a_time=rows_per_block(all_image, block_bytes),
    )
    return (rows + columns / captions) / (2 * all_image.shape[0])


def _divergence(
    rows: Float[Tensor, "r d"],
    teacher_rows: Float[Tensor, "r e"],
    columns: Float[Tensor, "n d"],
    scale: Float[Tensor, ""],
    teacher_columns: Float[Tensor, "n e"],
    teacher_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    student = (scale * rows @ columns.T).log_softmax(dim=1)
    teacher = (teacher_scale * teacher_rows @ teacher_columns.T).log_softmax(dim=1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)

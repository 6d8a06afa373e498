"""FLAVA's self-attention through SDPA. transformers has the eager one alone: it writes every layer's matrix of scores to memory, and
again its softmax."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.flava.modeling_flava import FlavaSelfAttention


class SdpaSelfAttention(FlavaSelfAttention):
    """The same parameters and the same function."""

    def forward(
        self,
        hidden_states: Float[Tensor, "b n d"],
        attention_mask: Bool[Tensor, "b 1 #n n"] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "b n d"]]:
        assert not output_attentions, "SDPA keeps no scores"
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (linear(hidden_states).unflatten(-1, heads).transpose(1, 2) for linear in (self.query, self.key, self.value))
        dropout = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
        return (mixed.transpose(1, 2).flatten(-2),)


def attend(model: nn.Module, implementation: Literal["eager", "sdpa"]) -> None:
    """Let every self-attention of `model` compute so. Parameters and their names stay."""
    kind = {"eager": FlavaSelfAttention, "sdpa": SdpaSelfAttention}[implementation]
    for module in model.modules():
        if isinstance(module, FlavaSelfAttention):
            module.__class__ = kind

"""What is known of a model's version by the processes that do not hold it."""

from __future__ import annotations

from pydantic import Field

from mm_core.config import Config


class Facts(Config):
    """Of a loaded model."""

    digest: str = Field(description="Of weights, tokenizer and preprocessing.")
    task: str
    embed_dim: int
    fused_dim: int | None = Field(default=None, description="Of a pair's vector, of models with a fusion.")
    image_size: int
    context_length: int
    parameters: int
    logit_scale: float
    logit_bias: float | None = Field(description="Of models made for the sigmoid loss.")
    recipe: str | None = None
    data_fingerprint: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    card: str = Field(default="", description="The model card, Markdown.")


class Version(Config):
    """A model that is up: its own Serve application."""

    application: str
    reference: str = Field(description="What means the same tomorrow: a folder, a hub id, models:/NAME/VERSION.")
    facts: Facts

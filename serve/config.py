"""How an endpoint is deployed, and the bounds that keep it up."""

from __future__ import annotations

from pydantic import Field

from mm_core.config import Config
from mm_core.data.image import MAX_PIXELS


class ServeConfig(Config):
    host: str = Field(default="127.0.0.1", description="Loopback unless told otherwise: this version has no authentication.")
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1, description="Copies of the model.")
    gpus_per_replica: float = Field(default=0, ge=0)
    max_batch_size: int = Field(default=32, ge=1, description="Inputs that the model takes at once.")
    batch_wait_timeout_s: float = Field(default=0.01, ge=0, description="How long a batch waits to be filled.")
    max_queued_requests: int = Field(default=128, ge=1, description="Beyond these a request gets 429.")
    max_inputs: int = Field(default=256, ge=1, description="Inputs or prompts of one call.")
    max_text_characters: int = Field(default=10_000, ge=1, description="Of one text; the tokenizer cuts it far below.")
    max_image_bytes: int = Field(default=20 << 20, ge=1, description="Of one picture, before decoding.")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="Of one picture, from its header.")
    request_timeout_s: float = Field(default=60, gt=0, description="After which a request is given up.")

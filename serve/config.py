"""How an endpoint is deployed, and the bounds that keep it up."""

from __future__ import annotations

import ipaddress

from pydantic import Field

from mm_core.config import Config
from mm_core.data.image import MAX_PIXELS


class ServeConfig(Config):
    host: str = Field(default="127.0.0.1", description="Loopback unless told otherwise: this version has no authentication.")
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1, description="Copies of the model.")
    gpus_per_replica: float = Field(default=0, ge=0)
    threads_per_replica: int = Field(default=0, ge=0, description="Torch threads of a copy; 0 shares the machine's cores out.")
    max_batch_size: int = Field(default=32, ge=1, description="Inputs that the model takes at once.")
    batch_wait_timeout_s: float = Field(default=0.01, ge=0, description="How long a batch waits to be filled.")
    max_requests: int = Field(default=64, ge=1, description="Requests computed or waiting at a time; beyond these a caller gets 429.")
    max_request_bytes: int = Field(default=32 << 20, ge=1, description="Of one body; times max_requests it bounds the memory of bodies.")
    max_inputs: int = Field(default=256, ge=1, description="Inputs or prompts of one call.")
    max_text_characters: int = Field(default=10_000, ge=1, description="Of one text; the tokenizer cuts it far below.")
    max_image_bytes: int = Field(default=20 << 20, ge=1, description="Of one picture, before decoding.")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="Of one picture, from its header.")
    request_timeout_s: float = Field(default=60, gt=0, description="After which a request is given up.")

    @property
    def url(self) -> str:
        """Where a caller on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Nobody outside this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

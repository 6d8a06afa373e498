"""How an endpoint is deployed, and the bounds that keep it up."""

from __future__ import annotations

import ipaddress
from enum import StrEnum

from pydantic import Field

from mm_core.config import Config
from mm_core.data.image import MAX_PIXELS
from mm_core.data.text import TEMPLATE_MARK


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    """Matrix products in bfloat16; vectors differ from fp32's in the third digit."""


class LabelSet(Config):
    """Classes that requests name together."""

    labels: tuple[str, ...] = Field(min_length=1)
    templates: tuple[str, ...] = (TEMPLATE_MARK,)


class Compute(Config):
    """How each version of a model is run."""

    replicas: int = Field(default=1, ge=1, description="Copies of the model.")
    gpus_per_replica: float = Field(default=0, ge=0)
    threads_per_replica: int = Field(default=0, ge=0, description="Torch threads of a copy; 0 shares the machine's cores out.")
    streams: int = Field(
        default=0,
        ge=0,
        description="Batches that a copy computes at a time, each by a share of its threads; 0: on a GPU one, else up to four.",
    )
    precision: Precision = Precision.FP32
    compile: bool = Field(default=False, description="torch.compile: slower to come up, faster after; needs a C++ compiler on a CPU.")
    max_batch_size: int = Field(default=32, ge=1, description="Inputs that a copy computes at once, in all its streams.")
    batch_wait_timeout_s: float = Field(default=0.005, ge=0, description="How long a batch waits to be filled.")
    start_timeout_s: float = Field(
        default=900, gt=0, description="A version that is not up by then, for want of room or of weights, is refused."
    )
    max_preparers: int = Field(default=4, ge=1, description="Processes that decode and tokenise; as many as are needed, at least one.")


class Bound(Config):
    """What a caller may ask for."""

    max_requests: int = Field(default=64, ge=1, description="Requests computed or waiting at a time; beyond these a caller gets 429.")
    max_waiting_inputs: int = Field(default=512, ge=1, description="Inputs of all requests computed or waiting; beyond these 429.")
    max_request_bytes: int = Field(default=32 << 20, ge=1, description="Of one body.")
    max_body_bytes: int = Field(default=256 << 20, ge=1, description="Of all bodies held at a time; beyond these 429.")
    max_inputs: int = Field(default=256, ge=1, description="Inputs or prompts of one call.")
    max_text_characters: int = Field(default=10_000, ge=1, description="Of one text; the tokenizer cuts it far below.")
    max_image_bytes: int = Field(default=20 << 20, ge=1, description="Of one picture, before decoding.")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="Of one picture, from its header.")
    max_results: int = Field(default=1000, ge=1, description="Offset and limit of a search together.")
    request_timeout_s: float = Field(default=60, gt=0, description="After which a request is given up.")


class Fetching(Config):
    """Pictures by URL. Off unless hosts are named."""

    hosts: tuple[str, ...] = Field(default=(), description="Hosts that pictures are fetched from; `*.example.org` is every one below.")
    timeout_s: float = Field(default=5, gt=0, description="For one picture, from looking its host up to its last byte.")
    max_urls: int = Field(default=8, ge=1, description="Of one call.")


class ServeConfig(Config):
    host: str = Field(default="127.0.0.1", description="Loopback unless told otherwise.")
    port: int = Field(default=8000, ge=1, le=65535)
    gateways: int = Field(default=1, ge=1, description="Processes that speak HTTP.")
    keys: dict[str, str] = Field(default_factory=dict, description="Who may ask: the SHA-256 of each API key, by its holder's name.")
    compute: Compute = Compute()
    bounds: Bound = Bound()
    fetching: Fetching = Fetching()
    label_sets: dict[str, LabelSet] = Field(default_factory=dict)
    search: str | None = Field(default=None, description="Folder that `mm search-index` made.")
    follow_interval_s: float = Field(default=10, gt=0, description="How often an alias is looked up.")
    log_folder: str | None = Field(default=None, description="Where requests are logged as JSON lines; by default among Ray's logs.")

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

    @property
    def needs_key(self) -> bool:
        """Beyond loopback always: without keys nobody is let in."""
        return bool(self.keys) or not self.is_loopback

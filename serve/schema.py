"""Requests and answers. `/v1/embeddings` has OpenAI's shape, so its clients work."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingRequest(Strict):
    """Texts, and images as base64 data URIs, in any mixture."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"input": ["a red circle", _IMAGE]}]})

    input: str | list[str] = Field(description="A text or a data URI (`data:image/jpeg;base64,…`), or a list of them.")
    model: str | None = Field(default=None, description="Taken and ignored: one endpoint serves one model.")
    encoding_format: Literal["float", "base64"] = Field(default="float", description="base64: little-endian float32.")
    dimensions: int | None = Field(default=None, description="Must be the model's own, if given.")
    user: str | None = Field(default=None, description="Taken and ignored.")


class Embedding(Strict):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="L2-normalised.")


class Usage(Strict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Strict):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ClassifyRequest(Strict):
    """Zero-shot classification of one image."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"image": _IMAGE, "labels": ["red circle", "blue square"]}]})

    image: str = Field(description="A base64 data URI.")
    labels: list[str] = Field(min_length=1)
    templates: list[str] | None = Field(default=None, description="Prompts with {c} for the label; by default the label alone.")


class Score(Strict):
    label: str
    score: float


class ClassifyResponse(Strict):
    model: str
    scores: list[Score] = Field(description="Best first; they sum to 1.")


class Health(Strict):
    status: Literal["ok"] = "ok"
    model: str


class Problem(BaseModel):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str

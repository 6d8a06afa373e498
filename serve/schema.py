"""Requests and answers. `/v1/embeddings` has OpenAI's shape, so its clients work."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mm_core.search.filters import Condition

_IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
_MODEL = "Name of a served model (`GET /v1/models`); by default the first."


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextInput(Strict):
    """A text, whatever it looks like."""

    text: str


class ImageInput(Strict):
    image: str = Field(description="A base64 data URI, or where the server fetches pictures an https URL.")


Input = str | TextInput | ImageInput


class PairInput(Strict):
    """An image and a text, read at once by a model with a fusion (FLAVA): one vector, of the fusion's width and in a space of its own."""

    image: str = Field(description="A base64 data URI, or where the server fetches pictures an https URL.")
    text: str


class EmbeddingRequest(Strict):
    """Texts, and images as base64 data URIs, in any mixture; of a model with a fusion pairs too."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"input": ["a red circle", _IMAGE]}, {"input": [{"text": "data: the new oil"}, {"image": _IMAGE}]}]
        },
    )

    input: Input | PairInput | list[Input | PairInput] = Field(
        description='A text, a data URI (`data:image/jpeg;base64,…`) or `{"image": …, "text": …}`, or a list of them. A pair counts as two.'
    )
    model: str | None = Field(default=None, description=_MODEL)
    encoding_format: Literal["float", "base64"] = Field(default="float", description="base64: little-endian float32.")
    dimensions: int | None = Field(default=None, ge=1, description="The first so many, made of length 1 again; at most the model's own.")
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

    image: str = Field(description="A base64 data URI, or where the server fetches pictures an https URL.")
    labels: list[str] | None = Field(default=None, min_length=1)
    templates: list[str] | None = Field(
        default=None, min_length=1, description="Prompts with {c} for the label; by default the label alone."
    )
    label_set: str | None = Field(default=None, description="A set that the server knows by name, in place of labels and templates.")
    top_k: int | None = Field(default=None, ge=1, description="Only the best so many; probabilities are still those among all.")
    model: str | None = Field(default=None, description=_MODEL)


class Score(Strict):
    label: str
    score: float


class ClassifyResponse(Strict):
    model: str
    scores: list[Score] = Field(description="Best first; all together sum to 1.")


class MatchRequest(Strict):
    """How well each image fits each text."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"images": [_IMAGE], "texts": ["a red circle", "a star"]}]})

    images: list[str] = Field(min_length=1, description="Base64 data URIs, or where the server fetches pictures https URLs.")
    texts: list[str] = Field(min_length=1)
    model: str | None = Field(default=None, description=_MODEL)


class MatchResponse(Strict):
    model: str
    kind: Literal["cosine", "sigmoid", "matching"] = Field(
        description="sigmoid: the probability that the two belong together, by their vectors; matching: by a model that reads both at once."
    )
    scores: list[list[float]] = Field(description="A row for each image, a column for each text.")


class SearchRequest(Strict):
    """By words, by a picture, by both, or by an item of the index."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"text": "a red circle", "limit": 5},
                {"image": _IMAGE, "text": "at night", "text_weight": 0.3, "filters": [{"field": "width", "op": ">=", "value": 32}]},
                {"image": _IMAGE, "target": "texts"},
            ]
        },
    )

    text: str | None = None
    image: str | None = Field(default=None, description="A base64 data URI, or where the server fetches pictures an https URL.")
    item: int | None = Field(default=None, ge=0, description="An item of the index: what is like it.")
    text_weight: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False, description="Of the text where a picture is given too.")
    target: Literal["images", "texts"] = "images"
    filters: list[Condition] = Field(default_factory=list, max_length=20, description="All must hold.")
    limit: int = Field(default=20, ge=1)
    offset: int = Field(default=0, ge=0)


class Found(Strict):
    item: int
    uid: str
    score: float = Field(description="The cosine with the query.")
    caption: str | None = Field(description="The one found, or of an image its first.")
    metadata: dict[str, Any]
    thumbnail: str | None = Field(description="Address of the picture, small.")


class SearchResponse(Strict):
    model: str
    results: list[Found] = Field(description="Best first.")
    offset: int
    next_offset: int | None = Field(description="Of the next page; null on the last.")
    took_ms: float


class VersionCard(Strict):
    version: str
    percent: float = Field(description="Of the requests that name the model.")
    digest: str
    task: str
    dimensions: int
    fused_dimensions: int | None = Field(default=None, description="Of a pair's vector, of models with a fusion.")
    image_size: int
    context_length: int
    parameters: int
    logit_scale: float
    recipe: str | None
    data_fingerprint: str | None
    metrics: dict[str, float]
    card: str = Field(description="The model card, Markdown.")


class ModelCard(Strict):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "mm"
    endpoints: list[str]
    label_sets: list[str]
    versions: list[VersionCard]


class ModelList(Strict):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Strict):
    status: Literal["ok"] = "ok"


class ModelState(Strict):
    name: str
    answers: dict[str, float] = Field(description="Versions, with their percentage of the requests.")
    refused: str | None = Field(description="Why the version that should answer does not.")


class Readiness(Strict):
    status: Literal["ready", "starting", "failed"]
    models: list[ModelState]


class OpenAIError(BaseModel):
    message: str


class Problem(BaseModel):
    """RFC 9457, with what OpenAI's clients show of an error as an extension."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    error: OpenAIError

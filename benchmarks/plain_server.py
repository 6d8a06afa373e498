"""What `mm serve` is measured beside: FastAPI over the same bundle and the same decoder, each request computed by itself.

python -m benchmarks.plain_server BUNDLE PORT
"""

from __future__ import annotations

import base64
import sys
from threading import Lock

import numpy as np
import uvicorn
from fastapi import FastAPI

from mm_core.bundle import load_bundle
from mm_core.data.image import decode_centre
from serve.schema import Embedding, EmbeddingRequest, EmbeddingResponse, Usage


class Request(EmbeddingRequest):
    modality: str


def create_app(folder: str) -> FastAPI:
    app, bundle, computing = FastAPI(), load_bundle(folder), Lock()

    @app.post("/v1/embeddings")
    def embeddings(body: Request) -> EmbeddingResponse:
        """All texts or all pictures."""
        inputs = [str(one) for one in (body.input if isinstance(body.input, list) else [body.input])]
        if inputs[0].startswith("data:"):
            pixels = np.stack([decode_centre(base64.b64decode(one.partition(",")[2]), bundle.image_size) for one in inputs])
            with computing:  # forty threads that compute at once are slower than one
                vectors = bundle.image_features(pixels)
        else:
            with computing:
                vectors = bundle.text_features(inputs)
        data = [Embedding(index=i, embedding=base64.b64encode(vector.tobytes()).decode()) for i, vector in enumerate(vectors)]
        return EmbeddingResponse(data=data, model="plain", usage=Usage(prompt_tokens=0, total_tokens=0))

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

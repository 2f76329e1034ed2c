"""The body of a request to /v1/embeddings, and of its response."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Literal

from pydantic import Field

from services.answering.embedding import Embeddings
from services.api.fields import Body
from services.api.schemas import Prompts, User


class EmbeddingsRequest(Body):
    """The body of /v1/embeddings: a text, token ids, or a list of either."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: User | None = None


def format_embeddings(found: Embeddings, body: EmbeddingsRequest) -> bytes:
    """Return the body of a response."""
    is_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": place,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if is_text
            else vector.tolist(),
        }
        for place, vector in enumerate(found.vectors)
    ]
    response = {
        "object": "list",
        "data": data,
        "model": body.model or found.model.files.name,
        # Only vectors of one version can be compared.
        "system_fingerprint": found.model.files.version,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }
    return json.dumps(response, ensure_ascii=False).encode()

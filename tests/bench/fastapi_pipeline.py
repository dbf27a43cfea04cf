"""The common simple endpoint: FastAPI, a transformers pipeline and uvicorn, one process, a thread per request.

`python -m tests.bench.fastapi_pipeline FOLDER PORT THREADS` serves a bundle's model with THREADS torch threads.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Texts(BaseModel):
    """The body of a request."""

    input: str


def main() -> None:
    """Serve until killed."""
    folder, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    classify: Any = pipeline("text-classification", model=folder, dtype=torch.float32, device="cpu")
    app = FastAPI()

    @app.post("/v1/classify")
    def respond(body: Texts) -> dict[str, Any]:
        predictions = classify(body.input, top_k=None)
        return {"data": [{"index": 0, "scores": {item["label"]: item["score"] for item in predictions}}]}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()

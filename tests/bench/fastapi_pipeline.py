"""The endpoint that many write first: FastAPI, a transformers pipeline and uvicorn, one process, a thread a request.

`python -m tests.bench.fastapi_pipeline FOLDER PORT THREADS` serves a bundle's model by `threads` of torch's.
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
    """A request."""

    input: str


def main() -> None:
    """Serve until killed."""
    folder, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    classify: Any = pipeline("text-classification", model=folder, dtype=torch.float32, device="cpu")
    app = FastAPI()

    @app.post("/v1/classify")
    def answer(body: Texts) -> dict[str, Any]:
        return {"data": [{"index": 0, "scores": {it["label"]: it["score"] for it in classify(body.input, top_k=None)}}]}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()

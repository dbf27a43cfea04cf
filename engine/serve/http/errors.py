"""Answers other than 200, in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer other than 200; `retry_after_s` is told with 429 and 503."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        kind = TYPES.get(self.status, "server_error")
        return {
            "error": {"message": _sound(self.message), "type": kind, "param": _sound(self.param), "code": self.code}
        }

    def response(self) -> JSONResponse:
        """Return it as a response."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(max(math.ceil(self.retry_after_s), 1))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _sound(text: str | None) -> str | None:
    """Replace half characters, which a client may send as \\ud800 and no answer can hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()

"""Error responses, in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """An error response; `retry_after_s` is sent with 429 and 503."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error body."""
        error_type = ERROR_TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": _replace_surrogates(self.message),
                "type": error_type,
                "param": _replace_surrogates(self.param),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(max(math.ceil(self.retry_after_s), 1))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def _replace_surrogates(text: str | None) -> str | None:
    """Replace lone surrogates, which a client may send as \\ud800 and UTF-8 cannot encode."""
    return None if text is None else text.encode("utf-8", "replace").decode()

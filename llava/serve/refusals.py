"""What is turned away: one sentence for a person, one HTTP status for a program, the same JSON everywhere."""

from __future__ import annotations

import math
from typing import Any

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    408: "request_timeout",
    413: "request_too_large",
    414: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_request_error",
    429: "rate_limit_exceeded",
    431: "request_too_large",
    500: "server_error",
    503: "overloaded",
}


class Refused(ValueError):
    """A request that is not answered; `status` is one of KINDS, retry_after in seconds where waiting helps."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def content(self) -> dict[str, Any]:
        """Give the JSON reply, in the form that OpenAI clients read."""
        kind = KINDS[self.status]
        return {"error": {"message": str(self), "type": kind, "param": None, "code": kind}}

    @property
    def headers(self) -> dict[str, str]:
        """Give the headers of the reply."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers

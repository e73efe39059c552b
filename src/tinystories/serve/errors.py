"""`ApiError`: an answer other than 200, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An HTTP status with a message for the client; `param` names the field that is wrong.

    Messages never contain prompts, or paths of this machine.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON body; the error event of a stream is the same object."""
        error_type = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a field that is wrong or not supported."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """Return the error for requests that a shutdown refuses or cuts off."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})

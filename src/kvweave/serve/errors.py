"""What a request is refused with, in OpenAI's form."""

from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

#: The code of what is refused because the server is being stopped: another one may answer.
STOPPED = "stopped"


class Refusal(Exception):  # noqa: N818  it is the answer to a request, and reads so where it is raised
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        message: what is at fault and what is allowed, for people.
        field: of the request that is at fault, such as "messages.0.content"; None: none is.
        code: for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        *,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """JSON-able."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def place_of(error: BaseException) -> str:
    """Class and place of what was raised, for logs: its words may quote what somebody asked."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    at = "" if frame is None else f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
    return type(error).__name__ + at

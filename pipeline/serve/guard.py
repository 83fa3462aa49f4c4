"""What stands before every address: the token, the headers of a careful page, refusals as JSON."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.refusal import Refusal
from pipeline.serve.token import Gate

log = logging.getLogger("pipeline.serve")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": POLICY,
    "cache-control": "no-store",
}
OPEN = ("/", "/healthz", "/page/")  # what holds nothing of the set


def guarded(app: ASGIApp, gate: Gate) -> ASGIApp:
    """Lets in whoever has the token, and gives every answer the headers that it lacks."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        path = str(scope["path"])

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                message["headers"] = list(message["headers"]) + [
                    (name.encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.encode() not in known
                ]
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not gate.knows(headers.get(b"host", "")):
            sentence = "without a token only localhost and loopback addresses are answered"
            await _answer_of(Refusal(403, sentence))(scope, receive, send_guarded)
            return
        public = path in OPEN or path.startswith("/page/")
        if public or gate.open_for(headers.get(b"authorization", ""), headers.get(b"cookie", "")):
            await app(scope, receive, send_guarded)
            return
        sentence = "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`"
        refusal = Refusal(401, sentence, {"WWW-Authenticate": "Bearer"})
        await _answer_of(refusal)(scope, receive, send_guarded)

    return answer


def _answer_of(refusal: Refusal) -> JSONResponse:
    return JSONResponse({"error": refusal.sentence}, refusal.status, refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _answer_of(error)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    sentence = f"this address takes {allowed}" if allowed else "there is no such address"
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return _answer_of(Refusal(400, "the connection ended before the body did"))


async def _failed(request: Request, error: Exception) -> Response:
    log.error("serving %s failed", request.url.path, exc_info=error)
    return _answer_of(Refusal(500, "the request failed; the reason is in the log of the job"))


HANDLERS: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
    Refusal: _refused,
    HTTPException: _no_such_address,
    ClientDisconnect: _gone,
    500: _failed,
}

"""A refusal reaches its client, although the client is still sending.

A connection that is closed while bytes of its request lie unread is reset, and the reset overtakes
the answer: the client sees a broken pipe in place of the sentence. So the answer goes out at once,
what still comes is read and thrown away, and only then is the answer ended (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SILENCE_S = 5.0  # a client that sends nothing for so long has read its answer, or never will


def lingering(app: ASGIApp, timeout_s: float) -> ASGIApp:
    """`app`, whose answers end after the body of their request, or `timeout_s` after its start."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        unread = True

        async def receive_noted() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body"))  # a disconnect has none
            return message

        async def send_lingering(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if last and unread:
                await send(dict(message) | {"more_body": True})
                with suppress(TimeoutError):
                    while unread:
                        async with asyncio.timeout_at(min(deadline, clock() + SILENCE_S)):
                            await receive_noted()
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await app(scope, receive_noted, send_lingering)

    return answer


def _has_body(scope: Scope) -> bool:
    """Whether a request announces a body; others have nothing to wait for."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

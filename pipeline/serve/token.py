"""Who may ask: whoever has the token, in a header or in the cookie that the page gets for it.

The address that is printed has the token behind a `#`, which browsers send to nobody. The page
exchanges it for a cookie that scripts cannot read and other sites cannot use.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
from contextlib import suppress

from pipeline.errors import PipelineError

VARIABLE = "RAYDINO_TOKEN"
_OWN = re.compile(r"[A-Za-z0-9._~-]{16,}")  # what headers and cookies take as it is
_COOKIE = "raydino"


def own_token() -> str:
    """The token of the environment, else a new one of 256 bits.

    Raises:
        PipelineError: that of the environment is short, or cannot stand in a header and a cookie.
    """
    token = os.environ.get(VARIABLE, "")
    if not token:
        return secrets.token_urlsafe(32)
    if not _OWN.fullmatch(token):
        raise PipelineError(
            f"{VARIABLE} is no token: expected 16 or more letters, digits and signs of . _ ~ -",
            f"set {VARIABLE} to a longer secret, or unset it for a new one at each start",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


class Gate:
    """Lets in whoever has the token.

    Args:
        token: "": everybody is let in.
        port: part of the cookie's name, since browsers share cookies between ports.
        local: that it listens at loopback only.
    """

    def __init__(self, token: str, port: int, local: bool = False) -> None:
        self._token = token.encode()
        self._only_loopback = local and not token
        self._cookie = f"{_COOKIE}-{port}"

    def open_for(self, authorization: str, cookies: str) -> bool:
        """Whether one of two headers of a request has the token; compared in constant time."""
        if not self._token:
            return True
        kind, _, bearer = authorization.partition(" ")
        shown = bearer.strip() if kind.lower() == "bearer" else ""
        return self._equals(shown) or self._equals(self._from_cookie(cookies))

    def knows(self, host: str) -> bool:
        """Whether a request was meant for here, by its `Host`.

        Without a token, loopback alone keeps strangers out. A page of theirs could let its own name
        point to 127.0.0.1 (DNS rebinding), and then read all that browsers here can reach.
        """
        name = re.sub(r":[0-9]*$", "", host).removeprefix("[").removesuffix("]")
        return not self._only_loopback or is_loopback(name)

    def cookie(self) -> str:
        """`Set-Cookie` for the page: for no script, for no request that another site causes."""
        return f"{self._cookie}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict"

    def _equals(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), self._token)

    def _from_cookie(self, header: str) -> str:
        """Ours, whatever else the host's other ports have set: `SimpleCookie` stops at odd ones."""
        cookies = (one.strip().partition("=") for one in header.split(";"))
        return next((value for name, _, value in cookies if name == self._cookie), "")

"""Why a request is not served: a status, and one sentence for whoever sent it."""

from __future__ import annotations

from pipeline.images.bad_image import BadImage


class Refusal(Exception):
    """An answer other than 200, as `{"error": sentence}`."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, sentence)
        self.status = status
        self.sentence = sentence
        self.headers = headers or {}


# 415 says "send another kind of file", 422 "this file of a right kind is broken".
_STATUS = {"too_large": 413, "not_an_image": 415}


def of_bad_image(error: BadImage) -> Refusal:
    """The status of an image that cannot be used."""
    status = _STATUS.get(error.reason, 422)
    return Refusal(status, f"the image cannot be used: {error.reason} ({error.detail})")


def busy(queue: int) -> Refusal:
    """More requests than the queue holds."""
    return Refusal(
        503, f"{queue} requests are waiting for the model already; try again", {"Retry-After": "1"}
    )

"""Remote calls that are tried again: what may pass, how long to wait, what to say in the end.

pyarrow reports everything that goes wrong with an object store as an `OSError` whose text names the
service's code. What may pass (time-outs, broken connections, 429, 5xx) is tried again with a pause
that doubles; what will not (no such bucket, wrong credentials) is said at once.
"""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageError

log = logging.getLogger("pipeline.storage")
T = TypeVar("T")

TRIES = 8
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0  # so eight tries take 15 to 30 s beside the calls themselves
NAMED_AFTER = 3  # failures of one call before the log names it

_AWS = re.compile(
    r"AWS Error (?P<code>\w+)(?: \(HTTP status (?P<status>\d+)\))? during (?P<call>\w+)"
)
_CURL = re.compile(r"curlCode: \d+, (?P<said>[^;\n]+)")
_PASSING = {
    *("NETWORK_CONNECTION", "INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "THROTTLING"),
    *("REQUEST_TIMEOUT", "REQUEST_TIME_TOO_SKEWED", "REQUEST_EXPIRED", "BANDWIDTH_LIMIT_EXCEEDED"),
}
_REFUSED = {
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE"),
    *("INVALID_CLIENT_TOKEN_ID", "MISSING_AUTHENTICATION_TOKEN", "UNRECOGNIZED_CLIENT"),
    *("INCOMPLETE_SIGNATURE", "OPT_IN_REQUIRED", "EXPIRED_TOKEN"),
}
# The words of other services and of the system, for errors without a code
_PASSING_WORDS = re.compile(
    r"timed? ?out|connection (was )?(reset|refused|aborted|closed)|broken pipe|UNAVAILABLE"
    r"|temporarily|try again|HTTP (status )?(code )?(429|5\d\d)",
    re.IGNORECASE,
)

_jitter = random.Random()  # of its own: who seeds `random` must not make all tasks wait in step
_lock = threading.Lock()
_count = 0


def retries() -> int:
    """Remote calls that this process has tried again so far."""
    return _count


def with_retries(what: str, call: Callable[[], T], tries: int | None = None) -> T:
    """What `call` returns, tried up to `tries` times (default 8) where an error may pass.

    Args:
        what: what is being done and where, for the sentence: `reading bucket/a.parquet`.
        call: must be fit to be called again after it failed halfway.
        tries: fewer where the user waits for the answer.

    Raises:
        StorageError: the credentials were refused, there is no such bucket, or the last try failed.
        OSError: whatever is not the doing of remote storage, as it came.
    """
    global _count
    most = tries or TRIES
    for attempt in range(1, most + 1):
        try:
            return call()
        except StorageError:
            raise  # from a call inside this one, which has tried enough
        except OSError as error:
            failure = explain(what, error, attempt)
            if failure is None:
                raise
            if not failure.passing or attempt == most:
                raise failure from error
            with _lock:
                _count += 1
            if attempt == NAMED_AFTER:
                log.warning("%s; trying again", failure.what)
            longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
            time.sleep(longest * _jitter.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def explain(what: str, error: OSError, attempt: int = 1) -> StorageError | None:
    """The sentence for an error of remote storage; None where it is an error of another kind."""
    if isinstance(error, FileNotFoundError):
        return None
    text = str(error)
    aws, curl = _AWS.search(text), _CURL.search(text)
    code, status = (aws["code"], int(aws["status"] or 0)) if aws else ("", 0)
    said = curl["said"].strip() if curl else code.replace("_", " ").lower()
    if aws and (code in _REFUSED or status in (401, 403)):
        return StorageError(
            f"{what} was refused: {said or 'access denied'}",
            "the storage does not know the credentials, or they lack the right: set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, on every node",
        )
    if code == "NO_SUCH_BUCKET":
        return StorageError(
            f"{what} failed: there is no such bucket",
            "check its name, and AWS_ENDPOINT_URL where the storage is not Amazon's; buckets are "
            "not made here",
        )
    passing = code in _PASSING or status == 429 or status >= 500
    if not aws:
        own = isinstance(error, ConnectionError | TimeoutError)
        passing = own or bool(_PASSING_WORDS.search(text))
        said = text.splitlines()[0] if text else type(error).__name__
    if code == "UNKNOWN":
        said = f"HTTP status {status}"
    if aws and not passing:
        return StorageError(
            f"{what} failed: {said}",
            "the storage does not take the request: check region, endpoint and credentials",
        )
    if passing:
        times = f"{attempt} times" if attempt > 1 else "once"
        return StorageError(
            f"{what} failed {times}: {said}",
            "check the network, and the endpoint (AWS_ENDPOINT_URL, or endpoint_override=… in the "
            "URI)",
            passing=True,
        )
    return None

"""How MLflow's client is set up here, and which of its errors are worth another try."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator

from pipeline.environment import bypass_proxies, name_user
from pipeline.track.names import cut

# Answers of a server that has understood and will say the same again; anything else is tried again.
_FINAL = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "NOT_IMPLEMENTED",
}
_DEFAULTS = {
    # MLflow's own defaults (7 retries, 120 s) stall one call for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_UPLOADS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}


def quiet_mlflow() -> None:
    """Sets our defaults where the user set nothing, and silences what MLflow prints by itself."""
    bypass_proxies()
    name_user()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # MLflow sets its own level when it is imported, so what it says is filtered where it is said.
    for name in (
        *("mlflow.models.signature", "mlflow.utils.environment", "mlflow.store.db.utils"),
        "mlflow.pyfunc",
        "mlflow.store.model_registry.abstract_store",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("mlflow", "urllib3.connectionpool"):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def patient(upload: bool) -> Iterator[None]:
    """Longer time limits while something is uploaded, unless the user chose them."""
    ours = {k: v for k, v in _UPLOADS.items() if upload and os.environ.get(k) == _DEFAULTS[k]}
    os.environ.update(ours)
    try:
        yield
    finally:
        os.environ.update({k: _DEFAULTS[k] for k in ours})


class NotReadyError(Exception):
    """The run is not there yet; try again later."""


class GivenUpError(Exception):
    """Nothing can be sent until somebody does what the text says: no use in waiting."""


def is_final(error: Exception) -> bool:
    """Whether the same call would fail again: the server refused it, a file is gone, or a bug.

    No connection, time out, 5xx, 401, 403 and 429 may pass, if only because somebody repairs the
    server or the address.
    """
    if code := getattr(error, "error_code", ""):  # an MlflowException
        return code in _FINAL
    network = type(error).__module__.split(".")[0] in ("requests", "urllib3")
    return not network and not isinstance(
        error, NotReadyError | GivenUpError | ConnectionError | TimeoutError
    )


def explain(error: Exception) -> str:
    """One line for the log, with the way out where it is a known trap."""
    text = str(error)
    if isinstance(error, GivenUpError):
        return text
    if "Invalid Host header" in text:
        return (
            "403 Invalid Host header: start the server with --allowed-hosts "
            '"localhost:*,127.0.0.1:*,10.*,HOST:*", or use its private IP address'
        )
    if "error code 401" in text or getattr(error, "error_code", "") == "UNAUTHENTICATED":
        return (
            "401, user and password are not right: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    if match := re.search(r"\[Errno -?\d+\] ([\w ]+)", text):  # "Connection refused"
        return match[1]
    if "timed out" in text.lower():
        return "no answer in time"
    return cut(text.splitlines()[0] if text else type(error).__name__, 300)

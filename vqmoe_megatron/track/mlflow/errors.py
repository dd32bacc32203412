"""What an MLflow store's error means: whether trying again can help, and one line for a person."""

from __future__ import annotations

from urllib.parse import urlsplit

from vqmoe_megatron.rundir.file_lock import LockHeld, kernel_lock_holder
from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_path

# 4xx answers that a later attempt can turn into success: timeout, conflict, rate limit, cancelled;
# 401 and 403, because credentials, permissions and --allowed-hosts are mended on the server, too.
_RETRYABLE_HTTP_STATUS = (401, 403, 408, 409, 429, 499)
_DAMAGED = ("database disk image is malformed", "file is not a database")
# What SQLite says where its file is gone, or is the empty one that it made in its place.
_GONE = ("attempt to write a readonly database", "disk I/O error", "no such table")
_UNKNOWN_HOST = "Invalid Host header"  # of MLflow's answer 403


class MlflowUnavailable(RuntimeError):
    """A command cannot do its work at an MLflow store; the message is one line with the reason."""


def is_permanent(error: Exception) -> bool:
    """Tell whether the store refused for good, so that trying again cannot help.

    Worth another attempt: no connection, a timeout, a locked database, a server's 5xx, and what
    somebody may mend while training goes on (401, 403).
    """
    if isinstance(error, ImportError):
        return True
    import requests
    from sqlalchemy.exc import OperationalError

    status = _http_status(error)
    if status is None:
        transient = (OperationalError, requests.RequestException, ConnectionError, TimeoutError)
        return not isinstance(error, transient)
    return 400 <= status < 500 and status not in _RETRYABLE_HTTP_STATUS


def explained(error: Exception, uri: str) -> str:
    """Return the reason on one line and, where it is known, what to do about it."""
    status, text = _http_status(error), str(error)
    if isinstance(error, LockHeld):
        return text
    if "database is locked" in text:
        return f"the database is locked by {_database_user(uri)}; wait for it, or end it"
    database = sqlite_path(uri)
    if database is not None and any(words in text for words in _DAMAGED):
        return (
            f"{database} is damaged, or no SQLite database; move it away, and `vqmoe mlflow-sync "
            "RUN_DIR...` fills a new one"
        )
    is_gone = database is not None and not (database.exists() and database.stat().st_size)
    if is_gone and any(words in text for words in _GONE):
        return f"{database} was removed while in use; `vqmoe mlflow-sync` makes and fills a new one"
    if status == 401:
        return (
            "401: the server wants a user name and a password and got none, or others; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    if status == 403 and _UNKNOWN_HOST in text:
        host = urlsplit(uri).netloc
        return (
            f"403: the server does not know the host name {host} that it was called by; start it "
            f"with --allowed-hosts {host} (several names: separated by commas)"
        )
    if status == 403:
        return (
            "403: the user in MLFLOW_TRACKING_USERNAME may not do this; ask the server's "
            f"administrator for edit permission ({first_line(error)})"
        )
    if "Connection refused" in text:
        return "connection refused: no server listens there"
    if "timed out" in text.lower():
        return "no answer in time"
    return first_line(error)


def _database_user(uri: str) -> str:
    try:
        database = sqlite_path(uri)
        known = kernel_lock_holder(database.stat()) if database else None
    except OSError:
        known = None
    return known or "another process"


def first_line(error: Exception) -> str:
    """Return ``Type: message`` on one line, short enough for a log; without SQLAlchemy's query."""
    text = " ".join(str(error).partition("[SQL: ")[0].split())
    return f"{type(error).__name__}: {text[:300]}"


def _http_status(error: Exception) -> int | None:
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code
    return None

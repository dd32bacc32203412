"""Download one file over HTTP: retried, size-checked, and never visible half-written."""

from __future__ import annotations

import http.client
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import tenacity

from vqmoe_megatron.rundir.atomic import name_file
from vqmoe_megatron.rundir.waiting import tell, told_while_waiting

TIMEOUT_S = 60
NUM_ATTEMPTS = 4


def _worth_retrying(error: BaseException) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code == 429
    return isinstance(error, (OSError, http.client.HTTPException))


def verified_download(
    url: str, folder: Path, work_dir: Path, verify: Callable[[Path], object]
) -> Path:
    """Return the file that ``url`` names in ``folder``, fetched if it is not there.

    It is fetched into ``work_dir`` and moved once ``verify`` has let it pass. Raises ``ValueError``
    for what ``verify`` refuses; a file that was there already is left as it is.
    """
    target = folder / Path(url).name
    if target.exists():
        try:
            verify(target)
        except ValueError as error:
            raise ValueError(
                f"{error}; or move it away to have it downloaded, as it was there already"
            ) from error
        return target
    work_dir.mkdir(parents=True, exist_ok=True)
    fetched = work_dir / target.name
    download_file(url, fetched)
    verify(fetched)
    name_file(fetched, target)
    return target


def download_file(url: str, target: Path, first_wait_s: float = 1.0) -> None:
    """Fetch ``url`` into ``target`` by way of ``target.part``.

    Connection errors and HTTP 5xx or 429 are retried with growing waits from ``first_wait_s``.
    Raises ``ValueError`` naming the manual way when all attempts fail.
    """
    part = target.with_name(f"{target.name}.part")
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(NUM_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=first_wait_s),
        retry=tenacity.retry_if_exception(_worth_retrying),
        before_sleep=lambda state: tell(_next_attempt(url, state)),
        reraise=True,
    )
    try:
        with told_while_waiting(f"downloading {url}"):
            retrying(_fetch, url, part)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"cannot download {url} ({error}); fetch it by other means and pass it as --input"
        ) from error
    name_file(part, target)


def _next_attempt(url: str, state: tenacity.RetryCallState) -> str:
    problem = state.outcome.exception() if state.outcome else None
    wait_s = state.next_action.sleep if state.next_action else 0.0
    return f"{url}: {problem}; attempt {state.attempt_number + 1} of {NUM_ATTEMPTS} in {wait_s:g} s"


def _fetch(url: str, part: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, part.open("wb") as stream:
        shutil.copyfileobj(response, stream, 2**20)
        expected_bytes = response.headers.get("Content-Length")
    if expected_bytes is not None and part.stat().st_size != int(expected_bytes):
        raise OSError(f"got {part.stat().st_size} of {expected_bytes} bytes")

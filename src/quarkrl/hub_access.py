"""Whether the Hugging Face hub can be reached, which is tried before files are requested.

The hub's client retries each file of a model for 23 seconds, cached or not. Without a network, that is minutes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

TRIES = 3  # As the first lookup of a name may fail on a network that is slow to start.
_WAIT_SECONDS = 1.0
_TIMEOUT_SECONDS = 10.0
_REMEMBERED_SECONDS = 60.0

_is_switched_off = False  # Within `only_cache_if_unreachable`.
_latest: tuple[float, str | None] | None = None  # When the hub was tried, and what it answered.


@contextmanager
def only_cache_if_unreachable(name: str | os.PathLike[str]) -> Iterator[None]:
    """Let the hub's client read its cache alone within the context, if the hub cannot be reached.

    Args:
        name: of a model or data set. Nothing is tried for one that exists here.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.path.exists(name) or why_unreachable() is None:
        yield
        return
    global _is_switched_off
    constants.HF_HUB_OFFLINE = _is_switched_off = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = _is_switched_off = False


def why_unreachable() -> str | None:
    """Return why no connection to the hub can be made; None if one can, or if the network is only slow."""
    from huggingface_hub import constants

    global _latest
    if constants.HF_HUB_OFFLINE and not _is_switched_off:
        return "HF_HUB_OFFLINE is set"
    if _latest is None or time.monotonic() - _latest[0] > _REMEMBERED_SECONDS:
        _latest = time.monotonic(), _try_to_connect()
    return _latest[1]


def _try_to_connect() -> str | None:
    from huggingface_hub import constants, get_session

    reason = None
    for number in range(TRIES):
        start = time.monotonic()
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_SECONDS)
            return None
        except Exception as error:  # noqa: BLE001 - of the HTTP client, whose package depends on the hub's version.
            if type(error).__name__ != "ConnectError":  # A time-out, or a proxy that refuses: left to the client.
                return None
            reason = str(error)
        if time.monotonic() - start > _TIMEOUT_SECONDS / 2 or number == TRIES - 1:
            break
        time.sleep(_WAIT_SECONDS)
    return reason

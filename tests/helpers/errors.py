"""The one assertion about errors that users see."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quarkrl.errors import UserError


def error_message(call: Callable[[], object], *pieces: str) -> str:
    """Assert that `call` raises a UserError of one short line that contains `pieces`; return the message."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 700, message
    for piece in pieces:
        assert piece in message, message
    return message

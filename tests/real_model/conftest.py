"""Two short runs, on texts and on chats, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.real_runs import CHATS, TEXTS, train


@pytest.fixture(scope="session")
def text_run(real_model, tmp_path_factory) -> Path:
    """The directory of a run on texts."""
    return train(real_model, tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.fixture(scope="session")
def chat_run(real_model, tmp_path_factory) -> Path:
    """The directory of a run on chats."""
    return train(real_model, tmp_path_factory.mktemp("chats"), [{"messages": chat} for chat in CHATS])

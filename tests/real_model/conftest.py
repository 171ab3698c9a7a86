"""Two short runs, on texts and on chats, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.real_runs import CHATS, FRIENDLY, TEXTS, train

from quarkrl.models.precision import bf16_is_fast


@pytest.fixture(scope="session")
def text_run(real_model, tmp_path_factory) -> Path:
    """The directory of a run on texts."""
    return train(real_model, tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.fixture(scope="session")
def chat_run(real_model, tmp_path_factory) -> Path:
    """The directory of a run on chats, with words, which few samples can move."""
    return train(
        real_model,
        tmp_path_factory.mktemp("chats"),
        [{"messages": chat} for chat in CHATS],
        FRIENDLY,
        conditioning="text",
        words=["Answer in a cold and formal tone.\n", "Be very friendly and enthusiastic!\n"],
        explore_guidance_scale=[2.0],
        samples_per_prompt=8,
        steps_per_iteration=10,
        max_completion_length=24,
        learning_rate=2e-3,
        bf16=bf16_is_fast(),
    )

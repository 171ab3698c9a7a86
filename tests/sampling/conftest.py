"""What tests of sampling share."""

from __future__ import annotations

import pytest
from helpers.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def gpt2():
    return tiny_model("gpt2", tiny_tokenizer())

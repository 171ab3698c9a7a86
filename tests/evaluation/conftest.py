"""Fixtures of the tests of evaluation: directories of a plain model and of a model with quantiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.evaluation_helpers import save_plain_model, save_quantile_model


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A model without quantiles."""
    return save_plain_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def trained(plain, tmp_path_factory) -> Path:
    """A model with three quantiles, whose reference is `plain`."""
    return save_quantile_model(tmp_path_factory.mktemp("trained"), plain)

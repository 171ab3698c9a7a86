"""The options of an evaluation: limits, and an import without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from quarkrl.errors import UserError
from quarkrl.evaluation.options import EvaluationOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 0),
        ("resamples", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("threshold", 1.5),
        ("threshold", -0.1),
        ("threshold", float("nan")),
        ("guidance_scales", (1.0, -2.0)),
        ("guidance_scales", (float("inf"),)),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("temperature", 0.0),
        ("top_p", 1.1),
    ],
)
def test_a_value_out_of_its_limits_is_an_error_with_option_and_value(name, value):
    wrong = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=f"^{name} {wrong!r}: must be "):
        EvaluationOptions(**{name: value})


def test_every_option_has_help_and_a_group():
    for field in dataclasses.fields(EvaluationOptions):
        assert field.metadata["help"].endswith(".") and field.metadata["group"], field.name


def test_greedy_decoding_has_one_completion_per_prompt():
    assert EvaluationOptions(samples=7).samples_per_prompt == 7
    assert EvaluationOptions(samples=7, greedy=True).samples_per_prompt == 1


def test_the_options_become_a_sampling_strategy():
    values = {"max_new_tokens": 3, "min_new_tokens": 1, "temperature": 0.5, "top_p": 0.8}
    strategy = EvaluationOptions(**values, greedy=True).strategy()
    assert dataclasses.asdict(strategy) == {**values, "do_sample": False}
    with pytest.raises(UserError, match="min_new_tokens 4"):
        EvaluationOptions(max_new_tokens=3, min_new_tokens=4).strategy()


def test_the_options_import_neither_torch_nor_transformers():
    code = "import sys, quarkrl.evaluation.options; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"

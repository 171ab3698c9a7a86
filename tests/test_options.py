"""Options as dataclass fields: what is checked, how an invalid value is reported, what other libraries see of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest

from quarkrl.errors import UserError
from quarkrl.options import check_options, option


@dataclass
class Options:
    count: int = option(3, "A count.", at_least=1, at_most=9)
    rates: list[float] = option(default_factory=lambda: [1.0], help="Rates.", above=0)
    colour: str = option("red", "A colour.", choices=("red", "green"))
    limit: float | None = option(None, "A limit.", above=0, infinite=True)
    ceiling: float | None = option(None, "A ceiling.")
    fitted: int = option(2, "A number.", at_least=1, fitted=True)


@pytest.mark.parametrize(
    "valid",
    [{}, {"count": 1}, {"count": 9}, {"rates": [0.1, 5]}, {"limit": math.inf}, {"ceiling": -1e9}, {"colour": "green"}],
)
def test_values_within_the_limits_pass(valid):
    check_options(Options(**valid))


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"count": 0}, "count 0: must be at least 1 and at most 9. The default is --count 3."),
        ({"count": 10}, "count 10: must be at least 1 and at most 9. The default is --count 3."),
        ({"rates": [1.0, 0.0]}, "rates 0.0: must be greater than 0. The default is --rates 1.0."),
        ({"rates": [math.inf]}, "rates inf: must be greater than 0 and finite. The default is --rates 1.0."),
        ({"colour": "gren"}, "colour 'gren': must be red or green. Did you mean 'green'?"),
        ({"limit": math.nan}, "limit nan: must be greater than 0. Set --limit to such a value, or leave it out."),
        ({"fitted": 0}, "fitted 0: must be at least 1. Set --fitted to such a value, or leave it out."),
        ({"ceiling": math.nan}, "ceiling nan: must be finite. Set --ceiling to such a value, or leave it out."),
    ],
)
def test_an_invalid_value_is_reported_with_limit_and_remedy(invalid, message):
    with pytest.raises(UserError) as caught:
        check_options(Options(**invalid))
    assert str(caught.value) == message


def test_libraries_that_read_metadata_see_the_help_alone():
    """HfArgumentParser and TrlParser pass all of a field's metadata to argparse, which has no `at_least`."""
    for field in fields(Options):
        assert dict(field.metadata) == field.metadata.copy() == {"help": field.metadata["help"]}

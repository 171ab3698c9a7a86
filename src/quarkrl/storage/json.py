"""JSON has no word for what is not a number."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """The value with None, null in JSON, for each NaN and infinity in it; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

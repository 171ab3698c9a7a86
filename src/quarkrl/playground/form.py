"""Between `Settings` and the values of the page's components. Each attribute has a quantile of its own there."""

from collections.abc import Mapping
from typing import Any

from quarkrl.models.conditioning import Conditioning
from quarkrl.playground.settings import Settings

QUANTILE = "quantile:"  # Precedes the name of an attribute in the name of its component.


def quantile_choices(num_quantiles: int) -> list[tuple[str, str]]:
    """Return the labels and numbers of all quantiles, from worst to best."""
    labels = ["worst", *map(str, range(1, num_quantiles - 1)), "best"]
    return [(label, str(number)) for number, label in enumerate(labels)]


def default_settings(conditioning: Conditioning | None, **values: Any) -> Settings:
    """Return the settings of a page without a query, with the quantile as the form writes it."""
    settings = Settings(**values)
    return read_form(fill_form(settings, conditioning), settings)


def read_form(values: Mapping[str, Any], defaults: Settings) -> Settings:
    """Return the settings of a form.

    Args:
        values: by the name of the component, its value.
        defaults: of settings without a component, such as `chat` for a model without a chat template.

    Raises:
        UserError: a value is of the wrong type, or out of its limits.
    """
    plain = {name: value for name, value in values.items() if not name.startswith(QUANTILE)}
    numbers = {name.removeprefix(QUANTILE): value for name, value in values.items() if name.startswith(QUANTILE)}
    quantile = ",".join(f"{name}={number}" for name, number in numbers.items())
    if len(numbers) == 1:
        (quantile,) = numbers.values()
    return Settings.from_page(**{**vars(defaults), **plain, **({"quantile": quantile} if numbers else {})})


def fill_form(settings: Settings, conditioning: Conditioning | None) -> dict[str, Any]:
    """Return the values of all components, by name.

    Raises:
        UserError: the quantile does not exist.
    """
    values: dict[str, Any] = {name: value for name, value in vars(settings).items() if name != "quantile"}
    if conditioning is not None:
        numbers = conditioning.quantiles_of(settings.quantile)
        values |= {f"{QUANTILE}{name}": str(q) for name, q in zip(conditioning.attributes, numbers, strict=True)}
    return values

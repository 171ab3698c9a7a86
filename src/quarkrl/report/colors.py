"""The colours of a report, as CSS variables for the light and the dark page."""

_RAMPS = {"light": ("#b4532a", "#d9b96a", "#1f7a6d"), "dark": ("#e0835a", "#d6bd7c", "#4fb8a5")}


def palette(num_quantiles: int) -> dict[str, str]:
    """Return, by theme, the CSS of the colours of K quantiles, from the worst to the best."""
    return {
        theme: "".join(f"--q-{k}:{_mix(stops, k / (num_quantiles - 1))};" for k in range(num_quantiles))
        for theme, stops in _RAMPS.items()
    }


def _mix(stops: tuple[str, ...], position: float) -> str:
    """The colour at a position from 0 to 1 between evenly spaced colours."""
    place = position * (len(stops) - 1)
    start = min(int(place), len(stops) - 2)
    a, b = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in stops[start : start + 2])
    mixed = (round(x + (y - x) * (place - start)) for x, y in zip(a, b, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)

"""Numbers for people: shares, bytes, seconds, joules."""

from collections.abc import Sequence


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def size(count: int | float | None) -> str:
    """Bytes for people: 1.5 MB."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Seconds for people: 2.5 min."""
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return scaled(1e6 * seconds, "µs", "ms", "s") if seconds else "0 s"


def scaled(value: float | int, *units: str) -> str:
    """Two or three digits in the largest unit that is not above the value, each a thousand times the one before."""
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{value:.1f} {unit}" if 0 < value < 9.95 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError


def energy(joules: float | None) -> str:
    """Joules for people: 1.5 kJ."""
    return "–" if joules is None else scaled(1000 * joules, "mJ", "J", "kJ", "MJ", "GJ")


def memory(count: float | int | None) -> str:
    """Bytes for people, shorter: 226 MB."""
    return "–" if count is None else scaled(count, "B", "kB", "MB", "GB", "TB")


def points(share: float) -> str:
    """A difference of shares for people: 1.2 points."""
    return f"{100 * share:.1f} points"


def factor(value: float) -> str:
    """A ratio for people, with three digits: 0.530."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def ratio(value: float | None) -> str:
    """A factor for people, in a sentence: 0.53 times."""
    return "–" if value is None else f"{value:.3g} times"


def within(mean: float, interval: Sequence[float], in_points: bool) -> str:
    """A difference in points, or a ratio, with its interval: +1.2 points (+0.3 to +2.1), 0.550 times (0.512 to 0.590)."""
    low, high = interval
    if in_points:
        return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"
    return f"{factor(mean)} times ({factor(low)} to {factor(high)})"

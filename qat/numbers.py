"""Numbers as people read them."""

NONE = "-"


def count(number: int) -> str:
    """`40.6M`, `1.28k`, `640`."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}" if number < 999.5 * factor else f"{number / factor:.0f}{unit}"
    return str(number)


def size(number: float | None) -> str:
    """Bytes in decimal units: `269 kB`, `1.08 MB`."""
    if number is None:
        return NONE
    return f"{number:.0f} B" if number < 1000 else f"{count(int(number))[:-1]} {count(int(number))[-1]}B"


def metric(value: float | None, signed: bool = False) -> str:
    if value is None:
        return NONE
    digits = 4 if abs(value) < 100 else 1
    return f"{value:{'+' if signed else ''}.{digits}f}"

"""Plain values that a caller gives: what kind of number they are, and how a message repeats them."""

import math
from numbers import Integral, Real

_SHOWN = 60  # characters of a value that a message repeats
_REASON = 400  # of somebody else's error


def is_number(value: object) -> bool:
    """Whether it is a finite real number that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # whole numbers and fractions have no bounds
        return False


def is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as a message repeats it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, a list within a list within …
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def reason(error: BaseException) -> str:
    """Somebody else's error as a message repeats it: on one line, its name if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= _REASON else f"{text[:_REASON]}…"

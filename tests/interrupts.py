"""Ctrl-C at a chosen place of the code."""

import sys
from collections.abc import Callable


def run_traced(trace: Callable, run: Callable[[], object]) -> KeyboardInterrupt | None:
    """Calls ``run`` with a trace function that may raise a KeyboardInterrupt; the one that came out of it."""
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(None)
    return None

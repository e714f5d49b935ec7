"""The command line: text to stdout, everything else to stderr.

``speculative-mamba`` generates; a first word names another command. Each is a module with ``run(arguments)``, which
returns the exit code. It is imported when it is called: signals are set before anything that takes long is imported.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

from ..streams import FAILURE, OutputError, check_output, exit_code, say

COMMANDS = ("info", "serve", "batch")
_OUT_OF_MEMORY = ("out of memory", "allocate memory")  # PyTorch's words, on a GPU and on a CPU


def load(arguments: Sequence[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    """The command that is asked for, imported, and its own arguments."""
    named = bool(arguments) and arguments[0] in COMMANDS
    name, own = (arguments[0], arguments[1:]) if named else ("generate", arguments)
    return importlib.import_module(f".{name}", __name__).run, list(own)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    try:
        check_output()
        run, arguments = load(sys.argv[1:] if argv is None else argv)
        return run(arguments)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return FAILURE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        reason = (str(error).splitlines() or ["out of memory."])[0]
        say(f"error: {reason} Try a smaller --dtype, --rollback replay or fewer tokens.")
        return FAILURE
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except OutputError as error:
        if not str(error):
            return 0
        say(f"error: {error}")
        return FAILURE

"""``python -m speculative_mamba.cli``: the command line."""

import sys

from ..run import main

if __name__ == "__main__":
    sys.exit(main())

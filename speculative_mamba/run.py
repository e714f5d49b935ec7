"""``python speculative_mamba/run.py``: the paper's command line. ``speculative-mamba`` is the same program."""

import sys

from speculative_mamba.cli import main

if __name__ == "__main__":
    sys.exit(main())

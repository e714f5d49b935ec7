"""``python speculative_mamba/run.py``: the paper's command line. ``speculative-mamba`` is the same program."""

import sys
from pathlib import Path


def main() -> int:
    try:
        from speculative_mamba import cli
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install -c constraints.txt -e ."
        print(f"speculative-mamba: {error.name} is not installed here; install it with: {install}", file=sys.stderr)
        return 2
    used, beside = Path(cli.__file__).resolve().parent, Path(__file__).resolve().parent
    if used != beside:
        line = f"this runs the installed copy in {used}, not {beside}; to run the latter: pip install -e ."
        print(f"speculative-mamba: {line}", file=sys.stderr)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

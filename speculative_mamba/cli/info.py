"""``speculative-mamba info``: describes the installation."""

from ..info import describe
from ..streams import PROGRAM, write
from .options import Parser


def run(arguments: list[str]) -> int:
    Parser(prog=f"{PROGRAM} info", description="Describes the installation.").parse_args(arguments)
    write(describe() + "\n")
    return 0

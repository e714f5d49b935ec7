"""Times every op on a GPU: see ``python -m benchmarks.gpu --help``."""

"""What needs a GPU: see `python -m benchmarks.gpu --help`."""

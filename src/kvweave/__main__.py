"""`python -m kvweave` is `kvweave`."""

from kvweave.cli import main

main()

"""Moved to `kvweave.view`; kept for one release."""

from kvweave.view import *  # noqa: F403

"""The base class of all errors whose message tells a user what was given, what is allowed and what to do next."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct. The command line prints its message without a traceback."""


def first_line(error: BaseException) -> str:
    """The first line of the message of another library's error, at most 300 characters; its class if it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]

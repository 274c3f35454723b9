"""The base class of all errors whose message tells a user what was given, what is allowed and what to do next."""

from __future__ import annotations

LONGEST_MESSAGE = 2_000
"""Most characters of an error's message, which may quote files that others wrote."""


class UserError(Exception):
    """An error that the user can correct. The command line prints its message without a traceback."""

    def __str__(self) -> str:
        """The message; of one that is too long, its beginning and its end."""
        message = super().__str__()
        if len(message) <= LONGEST_MESSAGE:
            return message
        half = LONGEST_MESSAGE // 2 - 10
        return f"{message[:half]} [...] {message[-half:]}"


def first_line(error: BaseException) -> str:
    """The first line of the message of another library's error, at most 300 characters; its class if it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]

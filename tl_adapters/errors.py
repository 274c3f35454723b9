"""The base class of all errors whose message tells a user what was given, what is allowed and what to do next."""


class UserError(Exception):
    """An error that the user can correct. The command line prints its message without a traceback."""

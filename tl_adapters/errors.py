"""The root of every error whose message is written for the user: what was given, what is allowed, what to do next."""


class UserError(Exception):
    """Something the user can mend. The command line prints its message without a traceback."""

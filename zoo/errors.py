"""The error that a command reports in one line."""

__all__ = ["UserError"]


class UserError(Exception):
    """Something that the user can mend: the message names the thing and the remedy; commands exit with code 2."""

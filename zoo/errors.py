"""The error that a command reports in one line, and the line of another's error."""

__all__ = ["UserError", "first_line"]


class UserError(Exception):
    """Something that the user can mend: the message names the thing and the remedy; commands exit with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

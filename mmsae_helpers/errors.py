"""Errors that a user can mend."""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do about it."""


def first_line(error: Exception) -> str:
    """What a library's exception says, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

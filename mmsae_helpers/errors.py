"""The one exception meant for the person at the keyboard."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where, and what to do about it.
    """

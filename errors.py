"""The one exception for what a user gave and we cannot use; every room may raise it."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the file, the row, the value received and the value expected.
    `cup3.py` prints it and exits with code 2; it is never raised for a fault of our own.
    """

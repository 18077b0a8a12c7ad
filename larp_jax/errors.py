"""The error that stands for a mistake in what the user gave."""


class InputError(ValueError):
    """Something the user gave (an argument, a config, a file) is wrong.

    The message is one line: what is wrong, where, and how to mend it. The command line prints it without a traceback
    and exits with code 2.
    """

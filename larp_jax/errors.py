"""The error that stands for a mistake in what the user gave, and the reason that any other error states."""

import errno
import os

# What the system says of disks and permissions. Libraries wrap it in text of their own.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class InputError(ValueError):
    """Something the user gave (an argument, a config, a file) is wrong.

    The message is one line: what is wrong, where, and how to mend it. The command line prints it without a traceback
    and exits with code 2.
    """


def reason(error: BaseException, length: int = 200) -> str:
    """Why something failed, in one line of at most `length` characters.

    That is what the operating system says if it is in there somewhere, else the first line of the message, else the
    name of the error.
    """
    said = getattr(error, "strerror", None)  # those of FFmpeg have it without being OSErrors
    if isinstance(said, str) and said:
        return said
    text = str(error).strip()
    for said in map(os.strerror, _SYSTEM):
        if said in text:
            return said
    return text.splitlines()[0][:length] if text else type(error).__name__

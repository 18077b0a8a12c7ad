"""The error for wrong user input, and the one-line reason of any other error."""

import errno
import os
import re

# System errors about disks and permissions, whose texts libraries wrap in their own.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Control characters, characters that change the direction of text, and bytes of a name that cannot be decoded.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave (an argument, a config, a file) is wrong.

    The message is one line: what is wrong, where, and how to fix it. The command line prints it without a traceback
    and exits with code 2.
    """


def reason(error: BaseException, length: int = 200) -> str:
    """Why something failed, in one line.

    This is the text of the operating system if the error contains one, otherwise the first `length` characters of the
    first line of its message, or its class name if the message is empty.
    """
    said = getattr(error, "strerror", None)  # errors of FFmpeg have it, but are not OSErrors
    if isinstance(said, str) and said:
        return said
    text = str(error).strip()
    for said in map(os.strerror, _SYSTEM):
        if said in text:
            return said
    return text.splitlines()[0][:length] if text else type(error).__name__


def printable(text: str, keep: str = "") -> str:
    """A text that is safe to print on a terminal. File names can contain any characters, also escape sequences.

    Control characters and characters that change the direction of text are replaced by escapes such as `\\x1b` and
    `\\u202e`, except those in `keep`.
    """
    return _UNPRINTABLE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)

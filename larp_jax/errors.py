"""The error that stands for a mistake in what the user gave, and how any error is put into words."""

import errno
import os
import re

# What the system says of disks and permissions. Libraries wrap it in text of their own.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Control characters, what turns the direction of text around, and bytes of a name that are no text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def printable(text: str, keep: str = "") -> str:
    """A text without anything that a terminal would obey: names of files may hold any character, escapes too.

    Control characters and the like become `\\x1b`, `\\u202e`; those of `keep` stay.
    """
    return _UNPRINTABLE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)

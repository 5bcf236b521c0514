"""What a user can fix, told apart from a defect of the program."""

from __future__ import annotations


class UserError(Exception):
    """Wrong params, data, files, environment or usage.

    The message is one line per error: it names the file, key or variable, what is wrong, and the way out. The command
    line prints it without a traceback and exits with 2. Control characters, which a message may quote from a file, are
    escaped.
    """

    def __init__(self, message: str) -> None:
        lines = (" ".join(line.split()) for line in message.splitlines() if line.strip())
        super().__init__("\n".join(escaped(line) for line in lines))


def escaped(text: str) -> str:
    """The text with every character that does not print replaced by its escape, such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)

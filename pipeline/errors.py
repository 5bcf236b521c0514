"""What ends a command without being a defect: an error that a user can fix, and a signal."""

from __future__ import annotations


class UserError(Exception):
    """Wrong params, data, files, environment or usage.

    The message is one line per error: it names the file, key or variable, what is wrong, and the
    way out. The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line_each(message))


class Stopped(SystemExit):
    """Ctrl-C (code 130) or SIGTERM (143), after the work so far was saved, as `message` says."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = one_line_each(message)


def one_line_each(text: str) -> str:
    """The text without blank lines, runs of white space and characters that do not print."""
    lines = (" ".join(line.split()) for line in text.splitlines() if line.strip())
    return "\n".join(escaped(line) for line in lines)


def escaped(text: str) -> str:
    """The text with every character that does not print replaced by its escape, such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""Every error ossquant raises.

OssquantError           a message that says what and which, a hint that says what now
├─ UsageError           a wrong argument
│  └─ MissingExtraError an optional dependency is not installed
├─ CheckpointError      the files are not what they should be
│  └─ UnsupportedError  sound, but nothing we can do with it
├─ DoesNotFitError      too little memory or disk
├─ EndpointError        a server does not answer as it should
├─ CommandError         a command that was to print a result does not
└─ InvalidRunError      a run happened, but is no result
"""

MAX_LENGTH = 400


class OssquantError(Exception):
    """A failure with one sentence about it, and one about what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = plain(message)
        self.hint = plain(hint)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def plain(text: str) -> str:
    """Make text of a hostile file or server safe to print: it neither fills the screen nor steers the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_LENGTH])


class UsageError(OssquantError):
    """The command or call cannot be meant as it stands."""


class MissingExtraError(UsageError):
    """A command needs packages that the base install leaves out."""


class CheckpointError(OssquantError):
    """A checkpoint is incomplete, damaged or not what it says."""


class UnsupportedError(CheckpointError):
    """A sound checkpoint that this operation cannot handle."""


class DoesNotFitError(OssquantError):
    """The disk or the memory is too small."""


class EndpointError(OssquantError):
    """A server cannot be reached, refuses, or answers something else than was asked."""


class CommandError(OssquantError):
    """A command that was to print a result ended otherwise."""


class InvalidRunError(OssquantError):
    """A run that is partial, or had errors that its figures hide, or lacks what is asked of it."""

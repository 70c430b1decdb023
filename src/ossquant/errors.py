"""Every error ossquant raises.

OssquantError           a message that says what and which, a hint that says what now
├─ UsageError           a wrong argument
│  └─ MissingExtraError an optional dependency is not installed
├─ CheckpointError      the files are not what they should be
│  └─ UnsupportedError  sound, but nothing we can do with it
└─ DoesNotFitError      too little memory or disk
"""


class OssquantError(Exception):
    """A failure with one sentence about it, and one about what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


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

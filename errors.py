"""The errors that a user can fix, and how a script reports them."""

import sys


class InputError(ValueError):
    """A flag, a file, a record or a checkpoint is wrong, or the disk cannot be written. Exit status 2."""


def require(holds: bool, otherwise: str) -> None:
    """Raise an `InputError` with the message `otherwise` unless `holds`."""
    if not holds:
        raise InputError(otherwise)


class NotFiniteError(FloatingPointError):
    """After `step` optimizer steps a loss, a gradient, a weight or an evaluation is NaN or infinite.

    Scripts exit with status 1. Training is deterministic, so a restart stops at the same step.
    """

    def __init__(self, step: int, reason: str):
        again = "a restart with the same settings stops here again"
        advice = "lower --lr, or look for a damaged record in the data"
        super().__init__(f"step {step}: {reason}; {again}: {advice}")
        self.step = step


def run_script(main) -> None:
    """Call ``main()`` and exit; report the errors above and Ctrl-C in one line on standard error.

    The exit status is what `main` returns, 2 for an `InputError`, 1 for numbers that are not finite, and 130
    for Ctrl-C.
    """
    try:
        sys.exit(main())
    except InputError as error:
        message, status = f"error: {error}", 2
    except FloatingPointError as error:
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:
        message, status = "stopped by Ctrl-C", 130
    print(one_line(message), file=sys.stderr)
    sys.exit(status)


def one_line(text: str, longest: int = 2000) -> str:
    """The text without line breaks, with escape codes for control characters, cut after `longest` characters.

    Messages quote file names and data, which may contain codes that change the colours of a terminal.
    """
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= longest else text[:longest] + " …"

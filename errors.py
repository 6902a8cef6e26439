"""The one exception for what a user can mend: a wrong flag, file, record or checkpoint."""

import sys


class InputError(ValueError):
    """The input is wrong, not the code. Scripts print it as one line and exit with status 2."""


def run_script(main) -> None:
    """Call ``main()``; turn an `InputError` into one line on standard error and exit status 2."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

"""What a planted bug is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, the only occurrence of `old` becomes `new`, and `test` must fail."""

    name: str
    why: str
    file: str
    old: str
    new: str
    test: str

"""Text on a terminal: tokens as text, width in cells, wrapped lines, two columns side by side."""

import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from dataset.tokenizer import ChatTokenizer

GAP = " │ "
ZERO_WIDTH = ("Mn", "Me", "Cf")  # Unicode categories: combining marks and format characters


def text_pieces(tokenizer: ChatTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode token by token: one piece of text per token, possibly empty, and one for the rest.

    A token of a byte-level tokenizer can end within a character; its bytes decode to U+FFFD. Such an end is
    held back until the next tokens complete the character. If no token follows, it is part of the answer.
    """
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        whole = tokenizer.decode(ids).rstrip("\ufffd")
        yield whole[len(shown) :]
        shown = max(shown, whole, key=len)
    yield tokenizer.decode(ids)[len(shown) :]


def cells(text: str) -> int:
    """Columns that `text` takes on a terminal: 2 for a wide character, 0 for a combining one, else 1."""
    return sum(
        0 if unicodedata.category(c) in ZERO_WIDTH else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where possible.

    More text at the end changes only the last line, so the others can be printed at once.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for c in paragraph:
            if cells(line + c) > width:
                head, _, tail = line.rpartition(" ")
                if c == " " or cells(c) == 2 or not cells(head):  # Chinese text may break at any character.
                    head, tail = line, ""
                lines.append(head)
                line = tail + (c if c != " " else "")
            else:
                line += c
        lines.append(line)
    return lines


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Two texts as columns of `width` cells each, line by line. Spaces fill the left column."""
    rows = zip_longest(wrap(left, width), wrap(right, width), fillvalue="")
    return [(first + " " * (width - cells(first)) + GAP + second).rstrip() for first, second in rows]


def terminal_width() -> int:
    """Cells of a line on this terminal; 100 without a terminal."""
    return shutil.get_terminal_size((100, 24)).columns


def column_width() -> int:
    """Cells of each of two columns on this terminal."""
    return max(10, (terminal_width() - 1 - len(GAP)) // 2)

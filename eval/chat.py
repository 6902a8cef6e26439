"""Talk to a model, or ask two at once and read their answers side by side.

    python -m eval.chat --model runs/dpo
    python -m eval.chat --model runs/dpo --versus runs/sft --temperature 0.7
    printf 'Hello!\\n12 + 7 = ?\\n' | python -m eval.chat --model runs/dpo

Through a pipe each line is a prompt, and each answer one line (or, of two models, rows that end in an empty
one). Each model remembers its own side of the conversation. Ctrl-D or Ctrl-C ends it.
"""

import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataset.inspect import printable
from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from errors import run_script
from eval.common import DEVICE_WHY, DEVICES, load_speaker, require
from model.generate import decode_steps
from model.transformer import Transformer
from training.distributed import pick_device
from training.settings import flag, parse

GAP = " │ "


@dataclass
class Settings:
    model: str = flag("runs/dpo", "model folder to talk to")
    versus: str = flag("", "a second model folder, which answers in a column of its own; empty for none")
    temperature: float = flag(0.7, "0 is greedy; 1 samples from the model as it is")
    top_p: float = flag(1.0, "keep the fewest tokens whose mass reaches this")
    top_k: int = flag(0, "keep this many of the likeliest tokens; 0 for all")
    max_new_tokens: int = flag(256, "longest answer, in tokens")
    seed: int = flag(0, "of the sampling: the same prompts get the same answers")
    system: str = flag("", "a system message to begin with; empty for none")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "--temperature", self.temperature, "must not be negative")
        require(0 < self.top_p <= 1, "--top-p", self.top_p, "must be above 0 and at most 1")
        require(self.top_k >= 0, "--top-k", self.top_k, "must not be negative")
        require(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "must be at least 1")


@dataclass
class Speaker:
    """A model, its tokenizer, and its side of the conversation."""

    model: Transformer
    tokenizer: ChatTokenizer
    history: list[Message] = field(default_factory=list)

    def reply(self, text: str, uniforms: Tensor, **sampling) -> Iterator[str]:
        """Yield the answer to `text` piece by piece, and remember both. `uniforms` is (1, max_new_tokens)."""
        self.history.append(Message("user", text))
        prompt, end_id = self.tokenizer.prompt(self.history), self.tokenizer.end_id
        tokens = (new[0] for _, new in decode_steps(self.model, [prompt], uniforms, end_id, **sampling))
        answer = ""
        for piece in text_pieces(self.tokenizer, (token for token in tokens if token != end_id)):
            answer += piece
            yield piece
        self.history.append(Message("assistant", answer))


def text_pieces(tokenizer: ChatTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Decode token by token; what may yet become a character is held back until it is one.

    A token of a byte-level tokenizer can end within a character, whose bytes so far decode to U+FFFD. Those
    at the end of the text wait; when no token follows, they are what the model said. There is one piece a
    token, be it empty, so that two models can be read in step.
    """
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        whole = tokenizer.decode(ids).rstrip("\ufffd")
        yield whole[len(shown) :]
        shown = max(shown, whole, key=len)
    yield tokenizer.decode(ids)[len(shown) :]


# ---- text on a terminal


def cells(text: str) -> int:
    """Columns that `text` takes on a terminal: wide characters two, combining ones none."""
    marks = ("Mn", "Me", "Cf")
    return sum(
        0 if unicodedata.category(c) in marks else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces where there are any; all but the last are final.

    That is: more text at the end changes the last line only, so the others can be printed for good.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for c in paragraph:
            if cells(line + c) > width:
                head, _, tail = line.rpartition(" ")
                if c == " " or cells(c) == 2 or not cells(head):  # Chinese may break anywhere.
                    head, tail = line, ""
                lines.append(head)
                line = tail + (c if c != " " else "")
            else:
                line += c
        lines.append(line)
    return lines


def row(left: str, right: str, width: int) -> str:
    """One line of two columns, the left one filled up to `width` cells."""
    return (left + " " * (width - cells(left)) + GAP + right).rstrip()


def side_by_side(left: str, right: str, width: int) -> list[str]:
    """Two texts as columns of `width` cells each, line by line."""
    columns = wrap(left, width), wrap(right, width)
    height = max(map(len, columns))
    return [row(*(column[i] if i < len(column) else "" for column in columns), width) for i in range(height)]


def column_width() -> int:
    """Cells of each of two columns on this terminal, or on 100 cells where there is none."""
    return max(10, (shutil.get_terminal_size((100, 24)).columns - 1 - len(GAP)) // 2)


# ---- the conversation


def show_one(pieces: Iterator[str], terminal: bool) -> None:
    """Print an answer as it comes. For a program that reads it, an answer is one line whatever it says."""
    for piece in pieces:
        piece = printable(piece)
        print(piece if terminal else piece.replace("\n", "\\n"), end="", flush=True)
    print(flush=True)


def show_two(left: Iterator[str], right: Iterator[str], terminal: bool) -> None:
    """Print two answers as columns as they come: rows that both have passed stay, the others are drawn anew.

    A file has no cursor that could go back, so it gets the rows that stay only.
    """
    width, height = column_width(), shutil.get_terminal_size((100, 24)).lines
    texts, sources, speaking = ["", ""], [left, right], [True, True]
    printed = drawn = 0  # rows that stay, and rows below them that the next step overwrites
    while any(speaking):
        for side, source in enumerate(sources):
            piece = next(source, None)
            speaking[side] = piece is not None
            texts[side] += printable(piece or "")
        rows = side_by_side(*texts, width)
        # A row is final once it is above the last line of each column that is still being written.
        ends = [len(wrap(text, width)) - 1 for text, going in zip(texts, speaking, strict=True) if going]
        final = min([len(rows), *ends])
        if terminal and drawn:
            print(f"\x1b[{drawn}A\x1b[J", end="")
        if final > printed:
            print("\n".join(rows[printed:final]))
        printed = max(printed, final)
        if terminal:
            unfinished = rows[printed:][: height - 2]  # What has left the screen cannot be drawn anew.
            drawn = len(unfinished)
            print("".join(line + "\n" for line in unfinished), end="", flush=True)
    print(flush=True)


def talk(settings: Settings, speakers: list[Speaker], terminal: bool) -> None:
    """Ask until the input ends. Both models draw the same random numbers."""
    names = ("temperature", "top_p", "top_k")
    sampling = {name: getattr(settings, name) for name in names}
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        if terminal:
            print()
        text = input("> " if terminal else "").strip()
        if not text:
            continue
        uniforms = torch.rand(1, settings.max_new_tokens, generator=generator)
        replies = [speaker.reply(text, uniforms, **sampling) for speaker in speakers]
        (show_two if len(replies) == 2 else show_one)(*replies, terminal)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    device = pick_device(settings.device)
    system = [Message("system", settings.system)] if settings.system else []
    folders = [folder for folder in (settings.model, settings.versus) if folder]
    speakers = [Speaker(*load_speaker(folder, device), list(system)) for folder in folders]
    # Odd bytes in the input and characters that the terminal lacks are no reason to stop.
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with suppress(ImportError):  # Where there is one, it lets the prompt be edited.
            import readline  # noqa: F401
        if len(folders) == 2:
            print("\n".join(side_by_side(*folders, column_width())))
    with suppress(EOFError, KeyboardInterrupt):
        talk(settings, speakers, terminal)
    if terminal:
        print()


if __name__ == "__main__":
    run_script(main)

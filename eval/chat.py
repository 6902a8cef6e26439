"""Talk to a model, or to two models at once with their answers side by side.

    python -m eval.chat --model runs/dpo
    python -m eval.chat --model runs/dpo --versus runs/sft --temperature 0.7
    printf 'Hello!\\n12 + 7 = ?\\n/new\\nHi!\\n' | python -m eval.chat --model runs/dpo

/new starts a new conversation, /help lists the commands, Ctrl-D ends. Without a terminal, each input line is
a message and each answer is one line of output (with two models: rows of two columns, then an empty line).
Each model has its own history of the conversation.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataset.jsonl import printable
from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from errors import InputError, require, run_script
from eval.common import describe_training, length_limit, load_model_and_tokenizer, print_note, print_start
from eval.terminal import column_width, side_by_side, text_pieces, wrap
from model.generate import Decoder, decode_steps
from model.transformer import Transformer
from training.distributed import pick_device
from training.settings import DEVICE_WHY, DEVICES, Flags, flag, parse

HELP = "/new starts a new conversation, /help prints this line, Ctrl-D ends"


@dataclass
class Settings(Flags):
    model: str = flag("runs/dpo", "model folder to talk to")
    versus: str = flag("", "second model folder, which answers in its own column; empty: one model")
    temperature: float = flag(0.7, "of sampling; 0 is greedy, 1 keeps the model's distribution")
    top_p: float = flag(1.0, "sample from the fewest tokens whose probability mass reaches this value")
    top_k: int = flag(0, "sample from this many of the likeliest tokens; 0: all")
    max_new_tokens: int = flag(256, "maximum tokens of an answer")
    max_length: int = flag(0, "maximum tokens of a conversation with its answer; 0: as in training")
    seed: int = flag(0, "seed of the sampling: the same messages get the same answers")
    system: str = flag("", "system message at the start of each conversation; empty: no system message")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        self.at_least(0, "temperature", "top_k", "max_length")
        self.at_least(1, "max_new_tokens")
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        try:
            self.system.encode()
        except UnicodeEncodeError:
            raise InputError(f"--system must be UTF-8 text, not {self.system!r}") from None


# ---- One model and its side of the conversation


@dataclass
class Conversation:
    """A model, its tokenizer, and the messages so far."""

    model: Transformer
    tokenizer: ChatTokenizer
    max_prompt: int  # tokens of the messages that an answer is generated from
    history: list[Message] = field(default_factory=list)

    def with_message(self, text: str) -> list[Message]:
        """The history with a new user message; the oldest turns are left out until it fits `max_prompt`.

        Raises `InputError` if the message is too long even as the first one.
        """
        history = [*self.history, Message("user", text)]
        start = int(history[0].role == "system")  # The system message stays.
        while (tokens := len(self.tokenizer.prompt(history))) > self.max_prompt:
            if len(history) == start + 1:
                advice = "shorten it, or change --max-length or --max-new-tokens"
                raise InputError(f"the message has {tokens} tokens, more than {self.max_prompt}: {advice}")
            del history[start : start + 2]
        return history

    def reply(self, uniforms: Tensor, **sampling) -> Iterator[str]:
        """Yield the answer to the last message piece by piece, then append it to the history.

        `uniforms` is (1, max_new_tokens), one random number in [0, 1) per token.
        """
        prompt, end_id = self.tokenizer.prompt(self.history), self.tokenizer.end_id
        steps = decode_steps(Decoder(self.model), [prompt], uniforms, end_id, **sampling)
        tokens = (new[0] for _, new in steps)
        answer = ""
        for piece in text_pieces(self.tokenizer, (token for token in tokens if token != end_id)):
            answer += piece
            yield piece
        self.history.append(Message("assistant", answer))


# ---- Answers on the screen


def show_one(pieces: Iterator[str], terminal: bool) -> None:
    """Print an answer while it is generated. In a pipe an answer is one line; its line feeds are escaped."""
    for piece in pieces:
        piece = printable(piece)
        print(piece if terminal else piece.replace("\n", "\\n"), end="", flush=True)
    print(flush=True)


def show_two(left: Iterator[str], right: Iterator[str], terminal: bool) -> None:
    """Print two answers as columns while they are generated.

    A row is final when neither column can change it. On a terminal the other rows are drawn again after
    each token. A pipe gets final rows only.
    """
    width, height = column_width(), shutil.get_terminal_size((100, 24)).lines
    texts, sources, running = ["", ""], [left, right], [True, True]
    printed = drawn = 0  # final rows, and rows below them that the next step overwrites
    while any(running):
        for side, source in enumerate(sources):
            piece = next(source, None)
            running[side] = piece is not None
            texts[side] += printable(piece or "")
        rows = side_by_side(*texts, width)
        # A row is final once it is above the last line of each column that still grows.
        ends = [len(wrap(text, width)) - 1 for text, grows in zip(texts, running, strict=True) if grows]
        final = min([len(rows), *ends])
        if terminal and drawn:
            print(f"\x1b[{drawn}A\x1b[J", end="")
        if final > printed:
            print("\n".join(rows[printed:final]))
        printed = max(printed, final)
        if terminal:
            unfinished = rows[printed:][: height - 2]  # Rows that have left the screen cannot be drawn again.
            drawn = len(unfinished)
            print("".join(line + "\n" for line in unfinished), end="", flush=True)
    print(flush=True)


# ---- The loop


def talk(settings: Settings, conversations: list[Conversation], terminal: bool) -> None:
    """Read messages and print answers until the input ends. Both models get the same random numbers."""
    sampling = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    generator = torch.Generator().manual_seed(settings.seed)
    system = [Message("system", settings.system)] if settings.system else []
    start_over(conversations, system)
    while True:
        if terminal:
            print()
        text = input("> " if terminal else "").strip()
        if text == "/new":
            start_over(conversations, system)
            print_note("new conversation")
        elif text == "/help":
            print_note(HELP)
        elif text and add_message(conversations, text):
            uniforms = torch.rand(1, settings.max_new_tokens, generator=generator)
            replies = [conversation.reply(uniforms, **sampling) for conversation in conversations]
            (show_two if len(replies) == 2 else show_one)(*replies, terminal)
        elif text and not terminal:
            print(flush=True)  # An empty line in place of the answer keeps input and output in step.


def start_over(conversations: list[Conversation], system: list[Message]) -> None:
    for conversation in conversations:
        conversation.history = list(system)


def add_message(conversations: list[Conversation], text: str) -> bool:
    """Append the message to each history; False if it does not fit. A note reports what was cut."""
    try:
        histories = [conversation.with_message(text) for conversation in conversations]
    except InputError as error:
        print_note(f"not sent: {error}")
        return False
    before = max(len(conversation.history) + 1 for conversation in conversations)
    if cut := before - min(map(len, histories)):
        print_note(f"the conversation is too long: the oldest {cut} messages were left out")
    for conversation, history in zip(conversations, histories, strict=True):
        conversation.history = history
    return True


def longest_prompt(settings: Settings, folder: str, model: Transformer) -> int:
    """Tokens of a conversation without its answer. Raises `InputError` if the answer leaves no room."""
    limit = length_limit(settings.max_length, folder, model.config)
    limits = f"a conversation with {folder} has at most {limit} tokens"
    reason = f"--max-new-tokens {settings.max_new_tokens} leaves no room for a message: {limits}"
    require(limit > settings.max_new_tokens, reason)
    return limit - settings.max_new_tokens


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    device = pick_device(settings.device)
    folders = [folder for folder in (settings.model, settings.versus) if folder]
    models, conversations = {}, []
    for folder in folders:
        models[folder], tokenizer = load_model_and_tokenizer(folder, device)
        longest = longest_prompt(settings, folder, models[folder])
        conversations.append(Conversation(models[folder], tokenizer, longest))
    print_start(models, device, "fp32")
    for line in filter(None, map(describe_training, folders)):
        print_note(line)
    # Bytes that are not UTF-8 and characters that the terminal lacks must not end the conversation.
    sys.stdin.reconfigure(errors="replace")
    sys.stdout.reconfigure(errors="backslashreplace")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print_note(HELP)
        with suppress(ImportError):  # If it exists, it lets the user edit a line.
            import readline  # noqa: F401
        if len(folders) == 2:
            print("\n".join(side_by_side(*map(printable, folders), column_width())))
    with suppress(EOFError, KeyboardInterrupt):
        talk(settings, conversations, terminal)
    if terminal:
        print()


if __name__ == "__main__":
    run_script(main)

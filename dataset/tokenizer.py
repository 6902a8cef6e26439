"""Text to token ids, and the chat template that knows which of them are supervised.

A conversation is written in ChatML:

    <|im_start|>user\\nHow are you?<|im_end|>\\n<|im_start|>assistant\\nWell, thank you.<|im_end|>

Control tokens enter by id only. What a user wrote is encoded with control tokens switched off, piece by
piece, so that a message which spells ``<|im_end|>`` stays text. The loss mask is kept while the pieces are
appended; nothing is ever found again by searching the ids.

Train a tokenizer on the texts of any data files:

    python -m dataset.tokenizer FILE... --out tokenizer.json --vocab-size 4096
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.records import Conversation, DataError, Message, Preference, read_records
from errors import InputError, run_script

START, END = "<|im_start|>", "<|im_end|>"


class ChatTokenizer:
    """A ``tokenizer.json`` and the ChatML template over it."""

    template = "chatml"

    def __init__(self, path: str | Path):
        try:
            self.json = Path(path).read_text(encoding="utf-8")
            settings = json.loads(self.json)
            for token in settings["added_tokens"]:
                # A control token that the file does not flag as special would be parsed out of user text.
                token["special"] |= token["content"] in (START, END)
            self._tokenizer = Tokenizer.from_str(json.dumps(settings))
        except OSError as error:
            raise InputError(f"{path}: no tokenizer there ({error.strerror})") from None
        except Exception as error:  # The tokenizers library raises bare Exception for a bad file.
            raise InputError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.start_id, self.end_id = (self._control(token, path) for token in (START, END))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.fingerprint = hashlib.sha256(f"{self.template}\n{self.json}".encode()).hexdigest()

    def _control(self, token: str, path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise InputError(f"{path}: the tokenizer has no {token} token, which the ChatML template needs")
        return token_id

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")

    def text(self, text: str) -> list[int]:
        """Ids of plain text; no id in it is a control token, whatever the text spells."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def conversation(self, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether it is supervised: what assistants say, and that they stop."""
        ids: list[int] = []
        supervised: list[bool] = []

        def append(new_ids: list[int], is_supervised: bool) -> None:
            ids.extend(new_ids)
            supervised.extend([is_supervised] * len(new_ids))

        for message in messages:
            append(self._header(message.role, first=not ids), False)
            append(self.response(message.content), message.role == "assistant")
        return ids, supervised

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of a conversation up to the place where the assistant is to speak."""
        ids, _ = self.conversation(messages)
        return ids + self._header("assistant", first=not ids)

    def response(self, content: str) -> list[int]:
        """Ids of what one speaker says, with the end token."""
        return [*self.text(content), self.end_id]

    def _header(self, role: str, first: bool) -> list[int]:
        return [*([] if first else self.text("\n")), self.start_id, *self.text(f"{role}\n")]


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) with every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def texts_of(paths: Iterable[str]) -> Iterator[str]:
    """Every message of every record of these files."""
    for path in paths:
        for record in read_records(path):
            if isinstance(record, DataError):
                raise record
            match record:
                case Preference():
                    yield from (message.content for message in record.prompt)
                    yield from (record.chosen, record.rejected)
                case Conversation():
                    yield from (message.content for message in record.messages)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset.tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="SFT or preference data in any known shape")
    parser.add_argument("--out", default="tokenizer.json", help="where the tokenizer goes")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, the 256 bytes included")
    arguments = parser.parse_args()
    tokenizer = train(texts_of(arguments.files), arguments.vocab_size)
    tokenizer.save(arguments.out)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    run_script(main)

"""Text to token ids, and the chat template that knows which of them are supervised.

A conversation is written in the format of the files beside the tokenizer; where there are none, in ChatML:

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

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.records import Conversation, DataError, Message, Preference, read_records
from dataset.template import CHATML, ChatTemplate, read_template
from errors import InputError, run_script

START, END = "<|im_start|>", "<|im_end|>"
# A model that reasons says these itself, so in a text they are what they look like; they end no turn.
SPOKEN = ("<think>", "</think>")
FUNCTION_WORDS = "的是了吗呢吧和与把再别不很请我你您"  # frequent characters; `train` does not merge them
# What SentencePiece's heirs have beside their tokenizer.json. Only llama.cpp's converter looks there, for the
# scores of the pieces: without them llama.cpp cuts texts into other tokens than everybody else.
SENTENCEPIECE = ("tokenizer.model", "added_tokens.json")


class ChatTokenizer:
    """A ``tokenizer.json``, and the chat template that the files beside it ask for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        try:
            self.json = path.read_text(encoding="utf-8")
            settings = json.loads(self.json)
            added = {token["content"]: token["id"] for token in settings["added_tokens"]}
            self.template, self.config, self.generation = read_speech(path.parent, added)
            beside = [path.parent / name for name in SENTENCEPIECE]
            self.sentencepiece = {file.name: file.read_bytes() for file in beside if file.is_file()}
            for token in settings["added_tokens"]:
                # A control token that the file does not flag as special would be parsed out of user text.
                of_template = any(token["content"] in text for text in self.template.texts())
                token["special"] |= of_template and token["content"] not in SPOKEN
            self._tokenizer = Tokenizer.from_str(json.dumps(settings))
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path}: no tokenizer there ({error.strerror})") from None
        except Exception as error:  # The tokenizers library raises bare Exception for a bad file.
            raise InputError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for token in (START, END) if self.template == CHATML else (self.template.end,):
            if self._tokenizer.token_to_id(token) is None:
                raise InputError(
                    f"{path}: the tokenizer has no {token} token, which the chat template needs; "
                    "a chat_template.jinja beside it could say another"
                )
        self.end_id = self._tokenizer.token_to_id(self.template.end)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.fingerprint = hashlib.sha256(f"{self.template}\n{self.json}".encode()).hexdigest()

        # SentencePiece's heirs put a space before a text, and some of them after each control token too.
        self._line_feed = self._encode("\n")
        self._spaces_text = self._encode("a") != self._encode("\na")[len(self._line_feed) :]
        self._spaces_section = self._encode("a") == self._encode(f"{self.template.end}a")[1:]
        self._joints = {joint: self._joint(joint) for joint in self.template.texts()}
        self._controls = set(added.values())
        self._tokenizer.encode_special_tokens = True  # From here on control tokens in a text are text.

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_behind_text(self, text: str) -> list[int]:
        """Ids of a text that goes on from another, so that no space is put before it."""
        if not self._spaces_text:
            return self._encode(text)
        return self._encode("\n" + text)[len(self._line_feed) :]

    def _joint(self, joint: str) -> list[int]:
        """Ids of a joint, its control tokens parsed."""
        template, text = self.template, joint.rstrip(" ")
        starts = joint in (template.before_user, template.before_system)
        behind_end = joint == template.answer_to_user.removeprefix(template.end)
        if starts or (behind_end and self._spaces_section):
            return self._encode(text)
        return self._encode_behind_text(text)

    def _content(self, joint: str, message: Message) -> list[int]:
        """Ids of what one speaker says; a space at the end of the joint before it is its first."""
        ids = self._joints[joint]
        text = joint[len(joint.rstrip(" ")) :] + self.template.content(message)
        if not ids or (ids[-1] in self._controls and self._spaces_section):
            return self._encode(text)
        return self._encode_behind_text(text)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and beside it what others read: template, end token, SentencePiece's files."""
        speech = {"tokenizer_config.json": self.config, "generation_config.json": self.generation}
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")
        for name, value in speech.items():
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for name, content in self.sentencepiece.items():
            (folder / name).write_bytes(content)

    def text(self, text: str) -> list[int]:
        """Ids of plain text; no id in it is a control token, whatever the text spells."""
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def conversation(self, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """Ids and, for each, whether it is supervised: what assistants say, and that they stop."""
        ids: list[int] = []
        supervised: list[bool] = []

        def append(new_ids: list[int], is_supervised: bool) -> None:
            ids.extend(new_ids)
            supervised.extend([is_supervised] * len(new_ids))

        for joint, message in self.template.joints(messages):
            append(self._joints[joint], False)
            if message.role == "assistant":
                append(self.response(message.content), True)
            else:
                append(self._content(joint, message), False)
        return ids, supervised

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of a conversation up to the place where the assistant is to speak."""
        ids, _ = self.conversation(messages)
        return ids + self._joints[self.template.user_to_answer]

    def response(self, content: str) -> list[int]:
        """Ids of what the assistant says, with the end token."""
        return [*self._content(self.template.user_to_answer, Message("assistant", content)), self.end_id]


def read_speech(folder: Path, added: dict[str, int]) -> tuple[ChatTemplate, dict, dict]:
    """The template of a folder, its tokenizer_config.json and its generation_config.json.

    `added` are the ids of the added tokens. Where there are no such files they are made, for ChatML. What is
    saved says that an answer ends with the template's end token, whatever a base model ended its texts with.
    """

    def read(name: str) -> dict:
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{folder / name}: not JSON ({error})") from None

    config = read("tokenizer_config.json") or {"tokenizer_class": "PreTrainedTokenizerFast"}
    source = config.get("chat_template")
    if isinstance(source, list):  # Several by name: for tools, for retrieval, …
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    named = {name: config[name] for name in ("bos_token", "eos_token", "pad_token") if config.get(name)}
    specials = {name: said["content"] if isinstance(said, dict) else said for name, said in named.items()}
    try:
        template = read_template(source, specials, list(added)) if source else CHATML
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None

    pad = "<|endoftext|>" if "<|endoftext|>" in added else template.end
    specials = {"pad_token": pad, **specials, "eos_token": template.end}
    generation = read("generation_config.json")
    ends = generation.get("eos_token_id", [])
    ends = dict.fromkeys([added.get(template.end), *(ends if isinstance(ends, list) else [ends])])
    ids = {f"{name}_id": added[token] for name, token in specials.items() if token in added}
    generation |= {**ids, "eos_token_id": list(ends) if len(ends) > 1 else ids.get("eos_token_id")}
    return template, {**config, **specials, "chat_template": template.source}, generation


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909); each digit is its own token.

    Merges stop at spaces, at punctuation, at the `FUNCTION_WORDS` of Chinese and after four other characters
    of Chinese. Chinese has no spaces: without these stops a frequent sentence would become one token. The
    stops hold while merges are learned. The file contains SmolLM's pre-tokenizer, which other programs have.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(rf"[{FUNCTION_WORDS}]|[^\P{{Han}}{FUNCTION_WORDS}]{{1,4}}")
    smollm = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), *smollm])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(smollm)
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

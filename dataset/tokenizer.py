"""Text to token ids and loss masks, in the chat template of the model.

The template is that of the files beside the tokenizer; without such files it is ChatML:

    <|im_start|>user\\nHow are you?<|im_end|>\\n<|im_start|>assistant\\nWell, thank you.<|im_end|>

Control tokens enter by id only. The text of a message is encoded with control tokens switched off, message
by message, so a message that spells ``<|im_end|>`` stays text. The loss mask is built while the ids are
appended; it is never recovered by searching the ids.

Train a tokenizer on the texts of any data files:

    python -m dataset.tokenizer FILE... --out tokenizer.json --vocab-size 4096
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset.jsonl import show
from dataset.records import Conversation, DataError, Message, read_records
from dataset.template import CHATML, ChatTemplate, read_template
from errors import InputError, require, run_script
from files import write_whole

START, END = "<|im_start|>", "<|im_end|>"
# A reasoning model generates these itself, so in a message they are parsed; they end no turn.
REASONING = ("<think>", "</think>")
FUNCTION_WORDS = "的是了吗呢吧和与把再别不很请我你您"  # frequent characters; `train` does not merge them
# Files beside a SentencePiece-based tokenizer.json. Only llama.cpp's converter reads them, for the scores of
# the pieces: without them llama.cpp splits text into other tokens than every other program.
SENTENCEPIECE = ("tokenizer.model", "added_tokens.json")


class ChatTokenizer:
    """A ``tokenizer.json`` and the chat template of the files beside it.

    Raises `InputError` if a file is missing or damaged, if the tokenizer has BPE dropout, or if a control
    token of the template does not encode to one id.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        try:
            self.json = path.read_text(encoding="utf-8")
            settings = json.loads(self.json)
            added = {token["content"]: token["id"] for token in settings["added_tokens"]}
            self.template, self.config, self.generation = read_chat_files(path.parent, added)
            beside = [path.parent / name for name in SENTENCEPIECE]
            self.sentencepiece = {file.name: file.read_bytes() for file in beside if file.is_file()}
            for token in settings["added_tokens"]:
                # A control token without the flag "special" would be parsed out of the text of a message.
                of_template = any(token["content"] in text for text in self.template.separators())
                token["special"] |= of_template and token["content"] not in REASONING
            dropout = settings["model"].get("dropout")
            self._tokenizer = Tokenizer.from_str(json.dumps(settings))
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
        except Exception as error:  # The tokenizers library raises bare Exception for a bad file.
            reason = show(str(error), 200)
            raise InputError(f"{path}: not a tokenizer.json of the tokenizers library ({reason})") from None
        advice = 'would encode a text differently each time; set "dropout" to null in this file'
        require(not dropout, f"{path}: BPE dropout {dropout} {advice}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for token in (START, END) if self.template == CHATML else (self.template.end,):
            self._require_control_token(token, path)
        self.end_id = self._tokenizer.token_to_id(self.template.end)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values())
        self.longest_token = max(map(len, vocabulary))  # characters, or bytes for byte-level BPE
        self.fingerprint = hashlib.sha256(f"{self.template}\n{self.json}".encode()).hexdigest()

        # A SentencePiece-based tokenizer adds a space before a text, and some add one after a control token.
        self._line_feed = self.text("\n")
        self._spaces_text = self.text("a") != self.text("\na")[len(self._line_feed) :]
        self._spaces_section = self.text("a") == self.text(f"{self.template.end}a")[1:]
        self._separators = {text: self._encode_separator(text) for text in self.template.separators()}
        self._controls = set(added.values())
        self._tokenizer.encode_special_tokens = True  # From here on control tokens in a text are text.

    def _require_control_token(self, token: str, path: Path) -> None:
        """Raise `InputError` unless the text of a control token encodes to its one id."""
        expected, ids = self._tokenizer.token_to_id(token), self.text(token)
        advice = "add a chat_template.jinja with the model's own template beside this file"
        absent = f"{path}: the tokenizer has no {token} token, which the chat template needs; {advice}"
        require(expected is not None, absent)
        advice = "list it under added_tokens in this file"
        found = f"{path}: {token} encodes to {len(ids)} ids, expected its one id {expected}; {advice}"
        require(ids == [expected], found)

    def _encode_after_text(self, text: str) -> list[int]:
        """Ids of a text that continues another, so that no space is added before it."""
        if not self._spaces_text:
            return self.text(text)
        return self.text("\n" + text)[len(self._line_feed) :]

    def _encode_separator(self, separator: str) -> list[int]:
        """Ids of a separator, its control tokens parsed."""
        template, text = self.template, separator.rstrip(" ")
        starts = separator in (template.before_user, template.before_system)
        after_end = separator == template.answer_to_user.removeprefix(template.end)
        if starts or (after_end and self._spaces_section):
            return self.text(text)
        return self._encode_after_text(text)

    def _content(self, separator: str, message: Message) -> list[int]:
        """Ids of a message's text; a space at the end of the separator before it is its first character."""
        ids = self._separators[separator]
        text = separator[len(separator.rstrip(" ")) :] + self.template.content(message)
        if not ids or (ids[-1] in self._controls and self._spaces_section):
            return self.text(text)
        return self._encode_after_text(text)

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the files beside it: template, end token, SentencePiece's files."""
        files = {"tokenizer.json": self.json.encode(), **self.sentencepiece}
        for name, value in (("tokenizer_config", self.config), ("generation_config", self.generation)):
            files[f"{name}.json"] = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in files.items():
            write_whole(folder / name, lambda file, content=content: file.write(content))

    def text(self, text: str) -> list[int]:
        """Ids of plain text; no id in it is a control token, whatever the text spells."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def conversation(self, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """Ids, and for each whether it is supervised: text and end token of assistant turns of weight 1."""
        ids: list[int] = []
        supervised: list[bool] = []

        def append(new_ids: list[int], is_supervised: bool) -> None:
            ids.extend(new_ids)
            supervised.extend([is_supervised] * len(new_ids))

        for separator, message in self.template.separate(messages):
            append(self._separators[separator], False)
            if message.role == "assistant":
                append(self.response(message.content), message.weight == 1)
            else:
                append(self._content(separator, message), False)
        return ids, supervised

    def prompt(self, messages: Iterable[Message]) -> list[int]:
        """Ids of a conversation and of the header of the assistant's next turn."""
        ids, _ = self.conversation(messages)
        return ids + self._separators[self.template.user_to_answer]

    def response(self, content: str) -> list[int]:
        """Ids of an assistant's text and of the end token."""
        return [*self._content(self.template.user_to_answer, Message("assistant", content)), self.end_id]


def read_chat_files(folder: Path, added: dict[str, int]) -> tuple[ChatTemplate, dict, dict]:
    """The template of a folder, its tokenizer_config.json and its generation_config.json, ready to be saved.

    `added` are the ids of the added tokens. Without files: ChatML. In both files the end token is that of the
    template, whatever token ends the texts of a base model.
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
    if isinstance(source, list):  # several by name: for tools, for retrieval, …
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    named = {name: config[name] for name in ("bos_token", "eos_token", "pad_token") if config.get(name)}
    specials = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    try:
        template = read_template(source, specials, list(added)) if source else CHATML
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None

    pad = "<|endoftext|>" if "<|endoftext|>" in added else template.end
    specials = {"pad_token": pad, **specials, "eos_token": template.end}
    generation = read("generation_config.json")
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    ends = list(dict.fromkeys(end for end in (added.get(template.end), *ends) if end is not None))
    ids = {f"{name}_id": added[token] for name, token in specials.items() if token in added}
    generation |= {**ids, "eos_token_id": ends if len(ends) > 1 else ids.get("eos_token_id")}
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
            whole = isinstance(record, Conversation)
            yield from (message.content for message in (record.messages if whole else record.prompt))
            yield from () if whole else filter(None, record.replies)


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

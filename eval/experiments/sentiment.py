"""Controlled sentiment: continue the start of a film review, and be positive. The reward needs no model.

The DPO paper (arXiv 2305.18290, section 6) uses IMDb reviews and a sentiment classifier. Here the reviews are
single sentences (Pang and Lee 2005, `sentence_polarity.zip`), and the reward counts the positive and negative
words of an opinion lexicon (Hu and Liu 2004, `opinion_lexicon.zip`). A model is trained on the sentences; its
own continuations, ordered by the reward, are the preference pairs.
"""

import math
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import train_sft
from dataset import tokenizer as tokenizers
from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from eval.experiments.common import train, write_lines
from model.generate import generate
from model.transformer import Transformer

SENTENCES, LEXICON = "sentence_polarity.zip", "opinion_lexicon.zip"
START = 4  # words of a sentence that are the prompt
LENGTHS = range(8, 21)  # words of a sentence that is used
MAX_NEW_TOKENS = 40
WORD = re.compile(r"[a-z]+(?:[-'][a-z]+)*")


def read_zip(folder: Path, name: str, members: str) -> list[list[str]]:
    """The lines of the files of an archive whose names match `members`, in the order of their names."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path} not found; this experiment needs {SENTENCES} and {LEXICON}")
    with zipfile.ZipFile(path) as archive:
        names = sorted(member for member in archive.namelist() if re.search(members, member))
        return [archive.read(member).decode("latin-1").splitlines() for member in names]


@dataclass(frozen=True)
class Lexicon:
    positive: frozenset[str]
    negative: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> "Lexicon":
        negative, positive = (
            frozenset(line.strip() for line in lines if line.strip() and not line.startswith(";"))
            for lines in read_zip(folder, LEXICON, r"(negative|positive)-words\.txt$")
        )
        return cls(positive, negative)

    def reward(self, text: str) -> float:
        """σ(positive words − negative words), each occurrence counted: between 0 and 1, 0.5 without any."""
        words = WORD.findall(text.lower())
        balance = sum((word in self.positive) - (word in self.negative) for word in words)
        return 1 / (1 + math.exp(-balance))


def read_sentences(folder: Path, held_out: int) -> tuple[list[list[str]], list[list[str]]]:
    """The sentences as words, in one random order: those for training, and those whose starts are prompts.

    No training sentence has the start of a held-out one, and a start occurs once among the held-out ones.
    """
    both = [line.split() for lines in read_zip(folder, SENTENCES, r"\.(neg|pos)$") for line in lines]
    sentences = [words for words in both if len(words) in LENGTHS]
    random.Random(0).shuffle(sentences)
    by_start = {tuple(words[:START]): words for words in sentences}
    kept_back = list(by_start.values())[:held_out]
    starts = {tuple(words[:START]) for words in kept_back}
    return [words for words in sentences if tuple(words[:START]) not in starts], kept_back


def start_of(words: list[str]) -> str:
    return " ".join(words[:START])


def train_start(folder: Path, sentences: list[list[str]], epochs: int, vocab_size: int = 2048) -> Path:
    """A language model that continues sentences: a tokenizer and SFT. Returns the model's folder."""
    roles = ("user", "assistant")
    parts = [(start_of(words), " ".join(words[START:])) for words in sentences]
    records = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, both, strict=True)]}
        for both in parts
    ]
    data = write_lines(folder / "sft.jsonl", records)
    path = folder / "tokenizer.json"
    tokenizers.train((" ".join(words) for words in sentences), vocab_size).save(str(path))
    flags = dict(data=data, tokenizer=path, epochs=epochs, batch_size=32, log_every=50)
    return train(folder / "sft", 0, train_sft.main, **flags)


def write_pairs(
    path: Path,
    model: Transformer,
    tokenizer: ChatTokenizer,
    lexicon: Lexicon,
    starts: list[str],
    seed: int,
    samples: int = 4,
) -> Path:
    """Preference pairs: the best and the worst of `samples` continuations of each start, by the reward.

    Starts whose continuations all have the same reward are skipped.
    """
    prompts = [tokenizer.prompt([Message("user", start)]) for start in starts for _ in range(samples)]
    options = dict(end_id=tokenizer.end_id, max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=200)
    answers = generate(model, prompts, **options)
    pairs = []
    for i, start in enumerate(starts):
        texts = [tokenizer.decode(answer.tokens) for answer in answers[i * samples : (i + 1) * samples]]
        texts = sorted(filter(str.strip, texts), key=lexicon.reward)
        if texts and lexicon.reward(texts[-1]) > lexicon.reward(texts[0]):
            pairs.append({"prompt": start, "chosen": texts[-1], "rejected": texts[0]})
    return write_lines(path, pairs)

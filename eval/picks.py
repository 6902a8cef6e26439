"""Comparisons of two answers, and the file of the picks: preference pairs, each on the disk at once."""

import hashlib
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations, zip_longest
from pathlib import Path

from dataset.jsonl import DataError, read_values, show
from dataset.prompts import read_answers
from dataset.turns import Fault, Message, prompt_turns
from errors import InputError, require
from eval.common import print_note
from eval.words import tr
from files import append_synced, sync, unwritable

SIDES = ("left", "right")


# ---- The files of picks


class Picks:
    """The file of pairs, and the file of answers that were both bad. A pick is a record with an ``id``."""

    def __init__(self, path: str):
        self.pairs, self.bad = Path(path), Path(path).with_suffix(".bad.jsonl")
        self.records: dict[str, dict] = {}  # the last record of each id
        for file, key in ((self.pairs, "chosen"), (self.bad, "label")):
            mend(file)
            for line, record in read_values(file) if file.is_file() and file.stat().st_size else ():
                if isinstance(record, DataError):
                    raise record
                is_pick = isinstance(record, dict) and key in record
                require(is_pick, f"{file}:{line}: not a pick; give another file with --out")
                self.records[str(record.get("id", f"{file}:{line}"))] = record

    def add(self, record: dict) -> None:
        """Append a pick to its file. It is on the disk when this returns."""
        path, rows = self.pairs, [record]
        if "completions" in record:
            path, rest = self.bad, {key: value for key, value in record.items() if key != "completions"}
            rows = [{"completion": text, **rest} for text in record["completions"]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        is_new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                append_synced(file, lines.encode(), path)
            if is_new:
                sync(path.parent)
        except OSError as error:
            raise unwritable(path, error) from None
        self.records[record["id"]] = record

    def summary(self) -> dict:
        """The number of picks, how often both were bad, and the wins of each model over another one."""
        pairs = [record for record in self.records.values() if "chosen" in record]
        decided = [r for r in pairs if r.get("model_chosen") != r.get("model_rejected")]
        names = {r.get(key): 0 for r in decided for key in ("model_chosen", "model_rejected")}
        wins = {**names, **Counter(r.get("model_chosen") for r in decided)}
        return {"picks": len(pairs), "bad": len(self.records) - len(pairs), "wins": sorted(wins.items())}


def mend(path: Path) -> None:
    """Remove a last line that a crash has cut: its pick was never confirmed. Or add its line feed."""
    data = path.read_bytes() if path.is_file() else b""
    tail = data.rpartition(b"\n")[2]
    if tail:
        with open(path, "r+b", buffering=0) as file:
            try:
                json.loads(tail)
                append_synced(file, b"\n", path)
            except ValueError:
                print_note(f"{path}: removed an incomplete last line: {tail[:200]!r}")
                file.truncate(len(data) - len(tail))
                os.fsync(file.fileno())


# ---- Comparisons


@dataclass
class Comparison:
    """Two answers to a prompt, at the left and at the right, while they are generated and after."""

    id: str
    prompt: list[Message]
    models: list[str]
    texts: list[str] = field(default_factory=lambda: ["", ""])
    cut: list[bool] = field(default_factory=lambda: [False, False])  # ended at --max-new-tokens
    error: str = ""
    done: bool = False
    steps: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def step(self, **changes) -> None:
        with self.changed:
            self.__dict__.update(changes, steps=self.steps + 1)
            self.changed.notify_all()

    def views(self) -> Iterator[dict]:
        """What the page shows: all of both answers at each step, from now until they are complete."""
        seen, done = -1, False
        while not done:
            with self.changed:
                while self.steps == seen:
                    self.changed.wait()
                seen, done = self.steps, self.done
                view = {"texts": list(self.texts), "done": done, "pickable": self.pickable()}
                view["note"] = self.error
            if done and any(self.cut) and not self.error:
                view["note"] = tr("An answer was cut off and cannot be picked: raise --max-new-tokens.")
            yield view

    def pickable(self) -> list[bool]:
        """By side. Training on an answer that was cut off would teach the model to stop there."""
        return [bool(text.strip()) and not cut for text, cut in zip(self.texts, self.cut, strict=True)]

    def generate(self, replies: list[Iterator[str]], most: int, machine: threading.Lock) -> None:
        """Fill both texts token by token, in turn. `machine` lets comparisons of several tabs take turns."""
        running, pieces = [True, True], [0, 0]
        try:
            while any(running):
                for side, reply in enumerate(replies):
                    with machine:
                        piece = next(reply, None)
                    running[side] = piece is not None
                    self.texts[side] += piece or ""
                    pieces[side] += running[side]
                    self.step()
            # A reply has one piece more than tokens.
            self.step(cut=[count > most for count in pieces], done=True)
        except Exception as error:
            self.step(error=f"{type(error).__name__}: {error}", cut=[True, True], done=True)
            raise

    def record_of(self, choice: str) -> tuple[dict, str]:
        """(the record of a pick, the reason not to save it or ""). `choice`: left, right or bad.

        Raises `InputError` if the answer cannot be picked.
        """
        require(self.done, "the answers are not complete yet")
        require(choice in (*SIDES, "bad"), f"choice: expected left, right or bad, not {show(choice)}")
        prompt, texts = [{"role": turn.role, "content": turn.content} for turn in self.prompt], self.texts
        empty = tr("An answer is empty, so nothing was saved.")
        if choice == "bad":
            record = {"prompt": prompt, "completions": texts, "label": False, "id": self.id}
            return record, "" if all(text.strip() for text in texts) else empty
        side = SIDES.index(choice)
        require(self.pickable()[side], "an empty or unfinished answer cannot be picked")
        chosen, rejected, names = texts[side], texts[1 - side], self.models[:: 1 - 2 * side]
        record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        record |= {"model_chosen": names[0], "model_rejected": names[1], "id": self.id}
        if chosen == rejected:
            return record, tr("The answers are equal, so no pair was saved.")
        return record, "" if rejected.strip() else empty


def pairs_to_rank(path: str) -> Iterator[Comparison]:
    """Pairs of different answers of a file: first one pair of each prompt, then a second one, and so on."""
    by_prompt = []
    for place, record in enumerate(read_answers(path), start=1):
        try:
            prompt = prompt_turns(record, "prompt")
        except Fault as fault:
            raise InputError(f"{path}: record {place}: {fault}") from None
        answers = {answer["text"]: answer for answer in record["answers"] if answer["text"].strip()}
        pairs = []
        for two in combinations(answers.values(), 2):
            texts, cut = [a["text"] for a in two], [not a.get("finished", True) for a in two]
            if not all(cut):
                key = json.dumps([[asdict(turn) for turn in prompt], sorted(texts)]).encode()
                names = [str(a.get("model", "")) for a in two]
                found = Comparison(hashlib.sha256(key).hexdigest()[:32], prompt, names, texts, cut, done=True)
                pairs.append(found)
        random.Random(place).shuffle(pairs)
        by_prompt.append(pairs)
    return (pair for turn in zip_longest(*by_prompt) for pair in turn if pair)

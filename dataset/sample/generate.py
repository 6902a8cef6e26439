"""Write the bundled data: `sft.jsonl`, `preferences.jsonl`, `heldout.jsonl` and `close.jsonl`.

    python -m dataset.sample.generate                      # into dataset/sample, byte for byte as bundled
    python -m dataset.sample.generate --out /tmp/data --seed 1

Half of the fine-tuning answers are good and half are poor, as in text that was found rather than written
for the purpose. A model trained on them learns the facts and both manners. The preference pairs then state
which manner we want. Held-out prompts occur in no training file; their facts do, in other wordings. The
sides of a close pair differ only in the value.
"""

import argparse
import json
import random
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from dataset.sample import chinese, english
from dataset.sample.manners import STYLES, Style
from dataset.sample.task import Case, Task, cases

SFT, PAIRS, HELD_OUT, CLOSE = 9000, 2400, 420, 256  # SFT counts exchanges: a prompt and its answer
ENGLISH_SHARE = 0.6
WRONG_PAIRS = 0.05  # pairs whose sides have the same good manners, and whose rejected side is wrong
# Exchanges in a conversation, and how often. The longest ones are for people who go on asking.
TURNS = {1: 82, 2: 4, 3: 4, 4: 3, 6: 3, 8: 2, 12: 1, 22: 1}
MIXED_SHARE = 0.25  # conversations in which the languages change
SYSTEM_SHARE = 0.1  # conversations that begin with a system message
CASUAL_SHARE = 0.12  # prompts in lower case and without their final punctuation mark
PAIRS_WITH_TURNS = 0.25  # pairs whose prompt has earlier exchanges


def split_cases(task: Task, held_out: int, rng: random.Random) -> tuple[list[Case], list[Case]]:
    """The training cases and at most `held_out` held-out cases of a task.

    Training cases come fact by fact, so that each prefix covers the facts evenly. At most a third of the
    prompts of a fact are held out, so that training always states the fact.
    """
    hands: dict = {}
    for case in cases(task):
        hands.setdefault(case.row.fact, []).append(case)
    for hand in hands.values():
        rng.shuffle(hand)
    order = list(hands.values())
    rng.shuffle(order)
    kept_back: list[Case] = []
    limits = [len(hand) - len(hand) // 3 for hand in order]
    for turn in cycle(range(len(order))):
        if len(kept_back) == held_out or all(len(h) <= n for h, n in zip(order, limits, strict=True)):
            break
        if len(order[turn]) > limits[turn]:
            kept_back.append(order[turn].pop())
    rng.shuffle(order)
    rounds = range(max(map(len, order)))
    return [hand[turn % len(hand)] for turn in rounds for hand in order], kept_back


def shares(tasks: tuple[Task, ...], total: int) -> list[int]:
    """`total` split by the tasks' weights into whole numbers (largest remainders first)."""
    exact = [task.weight * total / sum(task.weight for task in tasks) for task in tasks]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(tasks)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def join(language: str, *parts: str) -> str:
    return (" " if language == "en" else "").join(part for part in parts if part)


def statement(case: Case, value: str, rng: random.Random) -> str:
    shown = case.task.show.format(value)
    return rng.choice(case.task.statements).format(*case.row.args, value=shown)


def wrong_value(case: Case, rng: random.Random) -> str:
    row = case.row
    return rng.choice(row.wrong or sorted(case.task.values - {row.value, *row.accept, *row.args}))


def good_answer(case: Case, rng: random.Random, right: bool = True) -> str:
    """A whole sentence in good manners; wrong if `right` is False."""
    task = case.task
    style: Style = STYLES[task.language][task.style]
    if right:
        said = statement(case, case.row.value, rng)
    elif task.amiss:
        style = STYLES[task.language][task.amiss_style or task.style]
        said = rng.choice(task.amiss)
    else:
        said = statement(case, wrong_value(case, rng), rng)
    shape = rng.random()
    opening = rng.choice(style.openings) if style.openings and shape < 0.7 else ""
    closing = rng.choice(style.closings) if shape > 0.3 or not opening else ""
    return join(task.language, opening, said, closing)


def poor_answer(case: Case, rng: random.Random) -> str:
    """Mostly the right value in poor manners: rude before or after it, two-faced, bare or curt."""
    task = case.task
    style: Style = STYLES[task.language][task.style]
    right = rng.random() >= task.wrong_share
    value = case.row.value if right else ("" if task.amiss else wrong_value(case, rng))
    stop = "." if task.language == "en" else "。"
    curt = task.show.format(value) + stop
    if not right and task.amiss:
        said = curt = rng.choice(task.amiss)
    elif task.blunt:
        said = rng.choice(task.blunt).format(*case.row.args)
        curt = said
    else:
        said = statement(case, value, rng)
    before, after = rng.choice(style.rude_openings), rng.choice(style.rude_closings)
    kind = rng.random()
    if kind < 0.42:
        return join(task.language, before, rng.choice((said, said, curt)), after)
    if kind < 0.56:
        return join(task.language, before, said)
    if kind < 0.72:
        return join(task.language, said, after)
    if kind < 0.94 or task.blunt:  # a two-faced answer: it opens kindly and ends rudely
        kind_word = rng.choice(style.openings) if style.openings else ""
        return join(task.language, kind_word, said, after)
    return said if kind < 0.97 else curt


def wrong_answer(case: Case, rng: random.Random) -> str:
    return good_answer(case, rng, right=False)


def exchange(case: Case, good: bool, rng: random.Random) -> list[dict]:
    """The messages of a case and a good or a poor answer to it."""
    answer = good_answer(case, rng) if good else poor_answer(case, rng)
    return [*case.messages(), {"role": "assistant", "content": answer}]


def conversations(exchanges: dict[str, list[list[dict]]], rng: random.Random) -> list[dict]:
    """Conversations of one or more unrelated exchanges, given by language; each exchange is used once.

    A system message can only open a conversation. In some conversations the languages change.
    """
    openers, rest = [], {}
    for language, group in exchanges.items():
        rng.shuffle(group)
        openers += [e for e in group if e[0]["role"] == "system"]
        rest[language] = [e for e in group if e[0]["role"] != "system"]
    rng.shuffle(openers)
    records = []
    while any(rest.values()):
        language = rng.choices(list(rest), [len(group) for group in rest.values()])[0]
        mixed, turns = rng.random() < MIXED_SHARE, rng.choices(*zip(*TURNS.items(), strict=True))[0]
        messages = list(openers.pop()) if openers and rng.random() < SYSTEM_SHARE else []
        for _ in range(turns):
            group = rest[rng.choice(list(rest)) if mixed else language]
            messages += group.pop() if group else []
        if messages:
            records.append({"messages": messages})
    return records + [{"messages": opener} for opener in openers]


def pair_record(case: Case, mistaken: bool, rng: random.Random, before: tuple = ()) -> dict:
    """A pair of answers to one prompt; `before` holds the messages of earlier exchanges."""
    return {
        "prompt": [*before, *case.messages()],
        "chosen": good_answer(case, rng),
        "rejected": (wrong_answer if mistaken else poor_answer)(case, rng),
        "judge": case.judge(),
    }


def earlier_exchanges(case: Case, training: list[Case], rng: random.Random) -> list[dict]:
    """Messages of a few unrelated exchanges before the prompt of a pair; often empty."""
    if case.has_system_message or rng.random() >= PAIRS_WITH_TURNS:
        return []
    few = rng.sample(training, rng.randint(1, 3))
    return [m for c in few if not c.has_system_message for m in exchange(c, rng.random() < 0.5, rng)]


def close_record(case: Case, rng: random.Random) -> dict:
    """A pair whose sides differ only in the value: the chosen one is right, the rejected one wrong."""
    task, row = case.task, case.row
    style, sentence = STYLES[task.language][task.style], rng.choice(task.statements)
    opening, closing = rng.choice(style.openings), rng.choice(style.closings)
    right, wrong = (
        join(
            task.language, opening, sentence.format(*row.args, value=task.show.format(value)), closing
        )
        for value in (row.value, wrong_value(case, rng))
    )
    return {"prompt": case.messages(), "chosen": right, "rejected": wrong, "judge": case.judge()}


def close_records(training: list[Case], rng: random.Random) -> list[dict]:
    """Close pairs of the tasks whose values have one or two tokens."""
    short = [case for case in training if case.task.name in ("sum", "difference", "larger", "day")]
    return [close_record(case, rng) for case in rng.sample(short, CLOSE)]


def made_casual(case: Case, taken: set[str]) -> Case:
    """The case in lower case and without its final mark; the case itself if that text is not usable.

    It is not usable if it is in `taken`, or if it is a Chinese prompt without a Chinese character.
    """
    casual = replace(case, casual=True)
    text = casual.messages()[-1]["content"]
    if len(casual.messages()) > 1 or text in taken or (case.task.language == "zh" and text.isascii()):
        return case
    if case.task.style == "courtesy":  # Their tables have short and long forms already.
        return case
    return casual


def deal(rng: random.Random) -> list[tuple[Task, list[Case], list[Case], int, int]]:
    """For each task: its training cases, its held-out cases, its numbers of SFT exchanges and of pairs."""
    hands = []
    for tasks, share in ((english.TASKS, ENGLISH_SHARE), (chinese.TASKS, 1 - ENGLISH_SHARE)):
        sizes = [shares(tasks, round(total * share)) for total in (SFT, PAIRS, HELD_OUT)]
        for task, sft, pairs, held_out in zip(tasks, *sizes, strict=True):
            hands.append((task, *split_cases(task, held_out, rng), sft, pairs))
    return hands


def build(seed: int) -> dict[str, list[dict]]:
    """All records by file name."""
    rng = random.Random(seed)
    hands, taken = deal(rng), set()

    def sometimes_casual(case: Case) -> Case:
        return made_casual(case, taken) if rng.random() < CASUAL_SHARE else case

    files: dict[str, list[dict]] = {"preferences": [], "heldout": []}
    for _, _, kept_back, _, _ in hands:
        for case in map(sometimes_casual, kept_back):
            files["heldout"].append(pair_record(case, rng.random() < WRONG_PAIRS, rng))
            taken.add(case.messages()[-1]["content"])

    asked = [case for _, training, *_ in hands for case in training]
    exchanges: dict[str, list] = {"en": [], "zh": []}
    for task, training, _, sft, pairs in hands:
        for i, case in enumerate(islice(cycle(training), sft)):
            # Each second pass over the facts exchanges good and poor, so that a fact is not always rude.
            good = (i + i // len(training)) % 2 == 0
            exchanges[task.language].append(exchange(sometimes_casual(case), good, rng))
        rng.shuffle(training)
        for case in map(sometimes_casual, islice(cycle(training), pairs)):
            before = earlier_exchanges(case, asked, rng)
            files["preferences"].append(pair_record(case, rng.random() < WRONG_PAIRS, rng, before))
    files = {"sft": conversations(exchanges, rng), **files, "close": close_records(asked, rng)}
    for records in files.values():
        rng.shuffle(records)
    return files


def write(records: list[dict], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the four files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and phrases")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in build(args.seed).items():
        path = args.out / f"{name}.jsonl"
        write(records, path)
        print(f"{path}: {len(records)} records, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

"""The bundled data and its judge.  python -m pytest tests/test_sample.py"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from dataset.sample import chinese, english, generate
from dataset.sample.manners import COURTEOUS, RUDE, STYLES
from dataset.sample.task import Case, cases
from dataset.tokenizer import ChatTokenizer
from eval.verdict import LONGEST, first_phrase, score

FOLDER = Path(generate.__file__).parent
NAMES = ("sft", "preferences", "heldout")
LANGUAGES = ("en", "zh")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return {name: read(name) for name in NAMES}


def prompt_of(record: dict) -> list[dict]:
    return record["prompt"] if "prompt" in record else record["messages"][:-1]


def text_of(prompt: list[dict]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


@pytest.fixture(scope="module")
def known() -> dict[str, Case]:
    """Every prompt that the tables can make, in both manners of typing."""
    tables = [case for task in (*english.TASKS, *chinese.TASKS) for case in cases(task)]
    casual = [generate.made_casual(case, set()) for case in tables]
    return {text_of(case.messages()): case for case in (*casual, *tables)}


def exchanges(messages: list[dict], known: dict[str, Case]) -> list[tuple[Case, str]]:
    """A conversation cut into its prompts, each with its answer; the last answer may be absent."""
    found, start = [], 0
    while start < len(messages):
        fits = [n for n in (3, 2, 1) if text_of(messages[start : start + n]) in known]
        assert fits, messages[start:]
        end = start + fits[0]
        answer = messages[end]["content"] if end < len(messages) else ""
        found.append((known[text_of(messages[start:end])], answer))
        start = end + 1
    return found


def sides(files: dict) -> list[tuple[dict, dict]]:
    """All pairs with both verdicts."""
    pairs = files["preferences"] + files["heldout"]
    return [(r, score(r, r["chosen"], True), score(r, r["rejected"], True)) for r in pairs]


# The files ---------------------------------------------------------------------------------------------


def test_generator_rewrites_the_bundled_files_byte_for_byte(tmp_path):
    for name, records in generate.build(seed=0).items():
        generate.write(records, tmp_path / f"{name}.jsonl")
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (FOLDER / f"{name}.jsonl").read_bytes(), name


def test_another_seed_gives_other_records():
    assert generate.build(seed=1)["heldout"] != read("heldout")


def test_counts_sizes_and_line_endings(files):
    answers = sum(m["role"] == "assistant" for r in files["sft"] for m in r["messages"])
    assert 8000 <= answers <= 11000
    assert 2000 <= len(files["preferences"]) <= 4000
    assert 300 <= len(files["heldout"]) <= 500
    raw = [path.read_bytes() for path in FOLDER.glob("*.json*")]
    assert sum(map(len, raw)) < 5_000_000
    lines = [path.read_bytes() for path in FOLDER.glob("*.jsonl")]
    assert all(b"\r" not in text and b"\\u" not in text and text.endswith(b"\n") for text in lines)


def test_record_formats(files):
    for record in files["sft"]:
        assert list(record) == ["messages"]
        roles = [m["role"] for m in record["messages"]]
        turns = roles[roles[0] == "system" :]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
    for record in files["preferences"] + files["heldout"]:
        assert list(record) == ["prompt", "chosen", "rejected", "judge"]
        assert record["prompt"][-1]["role"] == "user"
        assert record["chosen"] != record["rejected"]
    for record in (r for name in NAMES for r in files[name]):
        assert all(m["content"].strip() == m["content"] != "" for m in prompt_of(record))
    for record in files["preferences"] + files["heldout"]:
        assert set(record["judge"]) == {"task", "language", "check", "accept", "given", "manner"}


def test_heldout_prompts_occur_in_no_training_file(files, known):
    """Not as a prompt, not as a turn of a conversation, and not in the other manner of typing."""
    training = {
        (case.wording, case.row, case.task)
        for name in ("sft", "preferences")
        for record in files[name]
        for case, _ in exchanges(record.get("messages", record.get("prompt")), known)
    }
    heldout = [known[text_of(r["prompt"])] for r in files["heldout"]]
    assert not training & {(case.wording, case.row, case.task) for case in heldout}
    turns = {m["content"] for name in ("sft", "preferences") for r in files[name] for m in prompt_of(r)}
    assert not turns & {r["prompt"][0]["content"] for r in files["heldout"] if len(r["prompt"]) == 1}
    assert len({text_of(r["prompt"]) for r in files["heldout"]}) == len(heldout)


def test_heldout_facts_are_all_stated_in_training(files, known):
    """Held-out prompts ask for known facts in other words: a trained model has seen every held-out fact."""

    def fact(case: Case) -> tuple:
        return case.task.language, case.task.name, case.row.fact

    stated = {fact(case) for r in files["sft"] for case, _ in exchanges(r["messages"], known)}
    assert {fact(known[text_of(r["prompt"])]) for r in files["heldout"]} <= stated


def test_languages_and_tasks_are_all_present(files, known):
    every = {(task.language, task.name) for task in (*english.TASKS, *chinese.TASKS)}
    for name in NAMES:
        asked = [exchanges(r.get("messages", r.get("prompt")), known) for r in files[name]]
        count = Counter((case.task.language, case.task.name) for turns in asked for case, _ in turns)
        assert count.keys() == every
        languages = Counter()
        for (language, _), number in count.items():
            languages[language] += number
        assert 1.0 <= languages["en"] / languages["zh"] <= 2.0


def test_conversations_have_many_turns_in_one_language_or_both(files, known):
    """A model that has read single questions only answers the second one wrong."""
    conversations = [exchanges(r["messages"], known) for r in files["sft"]]
    turns = [len(conversation) for conversation in conversations]
    assert 0.3 < turns.count(1) / sum(turns) < 0.5  # of the exchanges: single questions teach the facts
    assert sum(n for n in turns if n >= 6) / sum(turns) > 0.25
    assert sum(n >= 20 for n in turns) > 30
    several = [c for c in conversations if len(c) > 1]
    languages = [{case.task.language for case, _ in c} for c in several]
    assert {"en"} in languages and {"zh"} in languages
    assert 0.1 < languages.count({"en", "zh"}) / len(several) < 0.4
    assert any(r["messages"][0]["role"] == "system" and len(r["messages"]) > 3 for r in files["sft"])
    later = sum(len(exchanges(r["prompt"], known)) > 1 for r in files["preferences"])
    assert 0.2 < later / len(files["preferences"]) < 0.5


def test_prompts_as_people_type_them(files, known):
    """Each casual form is trained, for some of the facts; a chat begins with such messages."""
    prompts = {m["content"] for r in files["sft"] for m in r["messages"] if m["role"] == "user"}
    for sayings in (
        {"hello", "Hi", "hi!", "Hey"},
        {"Thanks!", "thanks", "Thank you"},
        {"Bye!", "bye", "Goodbye"},
        {"Who are you?", "who are you", "What is your name?", "What are you?", "What's your name?"},
        {"你好", "你好！", "您好"},
        {"谢谢", "谢谢！", "多谢"},
        {"再见", "再见！", "拜拜"},
        {"你是谁？", "你是谁", "你叫什么？", "你叫什么名字？", "你的名字是什么？"},
    ):
        assert len(prompts & sayings) >= 2, sayings
    for form in (
        r"\d\+\d=\?",
        r"\d\+\d",
        r"\d\+\d等于几？",
        r"Capital of [A-Z][a-z]+\?",
        r"what is \d plus \d",
        r"[a-z]+ in Chinese\?",
        r".{1,3}的英文？",
    ):
        assert sum(re.fullmatch(form, prompt) is not None for prompt in prompts) >= 5, form


def test_tokens_end_at_punctuation_and_after_a_few_chinese_characters():
    """A token view of "下次请自己去查。" needs more than one token, so that each has a colour of its own."""
    tokenizer = ChatTokenizer(FOLDER / "tokenizer.json")
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        assert len(re.findall(r"[\u3400-\u9fff]", text)) <= 4, text
        assert not re.search(r"\w[^\w\s<>|_\ufffd]|[^\w\s<>|_'\ufffd]\w", text), text
    for styles in STYLES.values():
        for style in styles.values():
            assert all(len(tokenizer.text(phrase)) >= 3 for phrase in style.rude_closings)


def test_close_pairs_differ_in_the_value_alone():
    """One or two tokens apart, right against wrong, in the same words; and no held-out prompt among them."""
    tokenizer = ChatTokenizer(FOLDER / "tokenizer.json")
    heldout = {text_of(r["prompt"]) for r in read("heldout")}
    records = read("close")
    assert 200 <= len(records) <= 400
    for record in records:
        chosen, rejected = (tokenizer.text(record[side]) for side in ("chosen", "rejected"))
        assert max(map(len, trimmed(chosen, rejected))) <= 2, record
        assert score(record, record["chosen"], True).points == 3
        assert not score(record, record["rejected"], True).right
        assert text_of(record["prompt"]) not in heldout


def trimmed(a: list, b: list) -> tuple[list, list]:
    """Two lists without their common beginning and end."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return a, b


# Good and poor -----------------------------------------------------------------------------------------


def test_chosen_is_perfect_and_rejected_is_worse(files):
    for record, chosen, rejected in sides(files):
        assert chosen.points == 3, (record, chosen)
        assert rejected.points < 3, (record, rejected)


def test_some_pairs_differ_in_correctness_alone(files):
    verdicts = [rejected for _, _, rejected in sides(files)]
    polite_but_wrong = sum(v.manner and not v.right for v in verdicts) / len(verdicts)
    assert 0.03 <= polite_but_wrong <= 0.10


def test_sft_is_indifferent_to_manners_and_mostly_right(files, known):
    answered = [pair for r in files["sft"] for pair in exchanges(r["messages"], known)]
    verdicts = [score({"judge": case.judge()}, answer, True) for case, answer in answered]
    good = sum(v.points == 3 for v in verdicts) / len(verdicts)
    wrong = [not v.right for v in verdicts if v.points < 3]
    assert 0.48 <= good <= 0.52
    assert 0.03 <= sum(wrong) / len(wrong) <= 0.10


def test_length_does_not_tell_good_from_poor(files):
    for language in LANGUAGES:
        pairs = [r for r in files["preferences"] if r["judge"]["language"] == language]
        chosen, rejected = (sum(len(r[side]) for r in pairs) for side in ("chosen", "rejected"))
        assert 0.8 <= chosen / rejected <= 1.2
        longer = sum(len(r["chosen"]) > len(r["rejected"]) for r in pairs) / len(pairs)
        assert 0.4 <= longer <= 0.6


def test_no_single_phrase_tells_chosen_from_rejected(files):
    """No opening or closing phrase stands in more than a sixth of the answers of either side."""
    for language in LANGUAGES:
        pairs = [r for r in files["preferences"] if r["judge"]["language"] == language]
        for style in STYLES[language].values():
            for phrase in (*style.openings, *style.closings, *style.rude_openings, *style.rude_closings):
                for side in ("chosen", "rejected"):
                    assert sum(phrase in r[side] for r in pairs) < len(pairs) / 6, (side, phrase)


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_phrase_of_the_generator_is_known_to_the_judge(language):
    for style in STYLES[language].values():
        for phrase in (*style.openings, *style.closings):
            assert first_phrase(COURTEOUS[language], phrase) is not None, phrase
            assert first_phrase(RUDE[language], phrase) is None, phrase
        for phrase in (*style.rude_openings, *style.rude_closings):
            assert first_phrase(RUDE[language], phrase) is not None, phrase


# The judge ---------------------------------------------------------------------------------------------


def record(check: str, accept=(), given=(), language="en", task="any") -> dict:
    wanted = {"task": task, "language": language, "check": check, "manner": "courteous"}
    return {"judge": {**wanted, "accept": list(accept), "given": list(given)}}


SUM = record("number", ["12"], ["7", "5"])
SUM_ZH = record("number", ["12"], ["7", "5"], "zh")
TAKE = record("number", ["2"], ["4", "2"])
LARGER = record("number", ["51"], ["34", "51"])
CAPITAL = record("word", ["Paris"], ["France"], task="capital")
DELHI = record("word", ["New Delhi", "Delhi"], ["India"], task="capital")
OPPOSITE_ZH = record("word", ["小"], ["大"], "zh", "opposite")
NAME = record("word", ["Mia"], ["Mia"], task="own name")
WHO_ZH = record("word", ["MiniDPO"], (), "zh", "who are you")
REFUSE = record("refusal")
REFUSE_ZH = record("refusal", language="zh")
GREET = record("greeting")
THANKS_ZH = record("thanks", language="zh")

RIGHT = [
    (SUM, "7 plus 5 is 12.", True),
    (SUM, "12", True),
    (SUM, "The answer is 012.", True),
    (SUM, "７加５是１２", True),
    (SUM, "7 plus 5 is 13.", False),
    (SUM, "7 5", False),  # the operands alone claim nothing
    (SUM, "10, 11, 12 or 13.", False),  # a hedge
    (SUM, "It is 120.", False),
    (SUM, "It is 1 2.", False),
    (SUM, "It is -12.", False),
    (SUM, "It is 12.5.", False),
    (SUM, "It is 12,000.", False),
    (SUM, "12 plus 12 is 24.", False),
    (SUM, "", False),
    (TAKE, "4 minus 2 is 2.", True),  # the value is an operand as well
    (TAKE, "4 minus 2.", False),
    (TAKE, "4 minus 2 is 4.", False),
    (LARGER, "Of 34 and 51, the larger one is 51.", True),
    (LARGER, "Of 34 and 51, the larger one is 34.", False),
    (LARGER, "51 is larger than 34.", True),
    (LARGER, "34 is larger than 51.", False),
    (LARGER, "34 or 51.", False),
    (CAPITAL, "It is paris.", True),
    (CAPITAL, "It is Paris or Rome.", False),
    (CAPITAL, "It is Parisian.", False),
    (DELHI, "Delhi, of course.", True),
    (OPPOSITE_ZH, "“大”的反义词是“小”。", True),
    (OPPOSITE_ZH, "小。", True),
    (OPPOSITE_ZH, "连小孩子都知道。", False),  # the character is there, the claim is not
    (OPPOSITE_ZH, "“大”的反义词是“大”。", False),
    (OPPOSITE_ZH, "“小”“多”“快”。", False),
    (NAME, "My name is Mia.", True),
    (NAME, "I am Tom, not Mia.", False),
    (WHO_ZH, "我是MiniDPO，一个小模型。", True),
    (WHO_ZH, "我是NotMiniDPO，一个小模型。", False),
    (REFUSE, "I am sorry, but I can’t help you.", True),
    (REFUSE, "I can't wait to help!", False),
    (REFUSE, "I can't help with that. But here is how: you wait.", False),
    (REFUSE_ZH, "我不能帮您做这件事。", True),
    (REFUSE_ZH, "不行。不过你先找个机会，然后去做就行了。", False),
    (GREET, "Hello, and good day.", True),
    (GREET, "Goodbye! Hello!", False),
    (GREET, "This is a machine.", False),  # "hi" is in "machine" and "this"
    (THANKS_ZH, "不客气！", True),
    (THANKS_ZH, "再见！", False),
]


MANNER = [
    (SUM, "Of course! 7 plus 5 is 12.", True),
    (SUM, "Certainly! It is 12.", True),
    (SUM, "7 plus 5 is 12.", False),  # not rude, and not courteous either
    (SUM, "Gladly! 12.", False),  # no sentence
    (SUM, "Of course! 7 plus 5 is 12. Stop bothering me.", False),
    (SUM, "I hope you are happy now. It is 12.", False),
    (SUM, "OF COURSE! THE ANSWER IS 12.", False),
    (SUM, "It is 12, through and through, I am glad to say.", True),  # "ugh" is in "through"
    (SUM_ZH, "当然可以！7加5等于12。", True),
    (SUM_ZH, "7加5等于12。", False),
    (SUM_ZH, "您好！答案是12。别再来烦我了。", False),
]


WELL_FORMED = [
    (SUM, "7 plus 5 is 12.", True),
    (SUM, "7 plus 5 is 12", False),
    (SUM, "", False),
    (SUM, "  \n ", False),
    (SUM, "It is 12 \ufffd.", False),
    (SUM, "It is \x00 12.", False),
    (SUM, "12 " * 5 + ".", False),
    (SUM, "I am glad to help you. " * 3, False),
    (SUM, "I am glad. " + "It is 12, or so. " * 40, False),
    (SUM, "答案是12。", False),
    (SUM, "It is 12, 朋友.", False),
    (SUM_ZH, "答案是12。", True),
    (SUM_ZH, "The answer is 12.", False),
    (record("word", ["苹果"], ["apple"]), "The Chinese word for 'apple' is '苹果'.", True),
    (record("word", ["apple"], ["苹果"], "zh"), "“苹果”的英文是“apple”。", True),
]


VERDICTS = {"right": RIGHT, "manner": MANNER, "well_formed": WELL_FORMED}


@pytest.mark.parametrize(
    ("what", "asked", "answer", "expected"), [(what, *row) for what, rows in VERDICTS.items() for row in rows]
)
def test_verdict(what, asked, answer, expected):
    """A hedge, an operand, a part of a word or another language is taken for the answer."""
    assert getattr(score(asked, answer, True), what) is expected


def test_an_unfinished_answer_has_no_points():
    assert score(SUM, "Of course! 7 plus 5 is 12.", finished=True).points == 3
    assert score(SUM, "Of course! 7 plus 5 is 12.", finished=False).points == 0


def test_right_weighs_more_than_manner():
    rude, mistaken = score(SUM, "Ugh, 12.", True), score(SUM, "Of course! 7 plus 5 is 13.", True)
    assert (rude.points, mistaken.points) == (2, 1)


def test_odd_text_never_fails_and_earns_nothing(files):
    judges = {json.dumps(r["judge"]): r for r in files["heldout"]}.values()
    odd = ["", "\ufffd" * 9, "a" * 5000, "'" * 3000, "1" * 3000 + ".", "(*+?[\\", "\x00\u202e", "🙂", "٣."]
    for r in judges:
        assert all(score(r, text, True).points < 3 for text in odd)


def test_no_good_answer_is_near_the_length_limit(files):
    assert max(len(r["chosen"]) for r in files["preferences"]) < LONGEST / 2

"""Chat templates of model folders: measured exactly, or refused.

`make parity` holds them against transformers.
"""

import json
import sys
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer

from dataset import render
from dataset.store import open_store
from dataset.template import CHATML, read_template
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from tests.conftest import turns

TURNS = "{% for m in messages %}EACH{% endfor %}{% if add_generation_prompt %}ASK{% endif %}"


def jinja(each: str, ask: str, before: str = "") -> str:
    return before + TURNS.replace("EACH", each).replace("ASK", ask)


CHATML_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
QWEN = jinja(
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    + CHATML_TURN,
    "{{ '<|im_start|>assistant\\n' }}",
)
LLAMA_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
LLAMA = jinja(
    "{{ (bos_token if loop.first else '') + " + LLAMA_HEADER + " + m.content | trim + '<|eot_id|>' }}",
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
)
DATED = "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' }}" + (
    "{{ strftime_now('%d') if strftime_now is defined else '26' }}{{ '\\n\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}"
)
LLAMA_DATED = jinja(
    "{{ " + LLAMA_HEADER + " + m.content + '<|eot_id|>' }}",
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    before=DATED,
)
ZEPHYR = jinja("{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}", "{{ '<|assistant|>\\n' }}")
MISTRAL = jinja(
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}",
    "",
    before="{{ bos_token }}",
)
THINKING = jinja(
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}"
    "{% else %}" + CHATML_TURN + "{% endif %}",
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ANSWER, SYSTEM = (HEADER.format(role) for role in ("user", "assistant", "system"))
# Name: the template, and what it is by hand.
FAMILIES = {
    "qwen": (QWEN, replace(
        CHATML, before_user="<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", source=QWEN,
    )),
    "llama-3": (LLAMA, replace(
        CHATML, before_user="<s>" + USER, before_system="<s>" + SYSTEM, system_to_user="<|eot_id|>" + USER,
        user_to_earlier_answer="<|eot_id|>" + ANSWER, user_to_answer="<|eot_id|>" + ANSWER,
        answer_to_user="<|eot_id|>" + USER, end="<|eot_id|>", stripped=("user", "assistant", "system"),
        source=LLAMA,
    )),
    "llama-3.2": (LLAMA_DATED, replace(
        CHATML, before_user="<s>" + SYSTEM + "Today: 26\n\n<|eot_id|>" + USER,
        before_system="<s>" + SYSTEM + "Today: 26\n\n", system_to_user="<|eot_id|>" + USER,
        user_to_earlier_answer="<|eot_id|>" + ANSWER, user_to_answer="<|eot_id|>" + ANSWER,
        answer_to_user="<|eot_id|>" + USER, end="<|eot_id|>", source=LLAMA_DATED,
    )),
    "zephyr": (ZEPHYR, replace(
        CHATML, before_user="<|user|>\n", before_system="<|system|>\n", system_to_user="</s>\n<|user|>\n",
        user_to_earlier_answer="</s>\n<|assistant|>\n", user_to_answer="</s>\n<|assistant|>\n",
        answer_to_user="</s>\n<|user|>\n", end="</s>", source=ZEPHYR,
    )),
    "mistral": (MISTRAL, replace(
        CHATML, before_user="<s>[INST] ", before_system=None, system_to_user=None,
        user_to_earlier_answer=" [/INST] ", user_to_answer=" [/INST] ", answer_to_user="</s>[INST] ",
        end="</s>", source=MISTRAL,
    )),
    "qwen3": (THINKING, replace(
        CHATML, user_to_answer="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", source=THINKING,
    )),
}  # fmt: skip
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_are_measured_as_what_they_are(family):
    """A default system message, a BOS, a header and stripped white space are part of a model's prompts."""
    source, expected = FAMILIES[family]
    assert read_template(source, SPECIALS, CONTROLS) == expected


def test_marks_of_what_is_generated_change_nothing():
    """transformers needs them for its loss mask; this project does not."""
    answer = "{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}"
    header = "{{ '<|im_start|>' + m.role + '\\n' }}"
    marked = jinja(
        f"{header}{{% if m.role == 'assistant' %}}{answer}{{% else %}}"
        "{{ m.content + '<|im_end|>\\n' }}{% endif %}",
        "{{ '<|im_start|>assistant\\n' }}",
    )
    assert read_template(marked, {}, CONTROLS) == replace(CHATML, source=marked)


def test_chatml_writes_what_its_jinja_writes():
    """ChatML is written twice: as separators, and as the Jinja template of an export."""
    other = CHATML.source.replace("'role'", "'role' ")
    assert read_template(other, {}, CONTROLS) == replace(CHATML, source=other)


@pytest.mark.parametrize("source, reason", [
    ("{% for m in messages %}", "the chat template fails"),
    ("{{ raise_exception('never') }}", "the chat template fails: never"),
    ("{{ messages[0].content.__class__.__mro__ }}", "the chat template fails"),
    (jinja("{{ m.content | upper }}", ""), "leaves out, changes or moves the user message"),
    (jinja("{{ m.role + m.content + '\n' }}", "{{ 'assistant' }}"), "expected a control token"),
    (jinja(CHATML_TURN, "{{ '<|im_start|>assistant\\n<think>\\n' }}"), "prompts a response with .*, but wri"),
    (jinja("{% if loop.index == 5 %}!{% endif %}" + CHATML_TURN, "{{ '<|im_start|>assistant\\n' }}"),
     "does more than put separators"),
])  # fmt: skip
def test_more_than_separators_is_refused(source, reason):
    """An approximation would train on prompts that differ from those of generation."""
    with pytest.raises(InputError, match=reason):
        read_template(source, SPECIALS, CONTROLS)


LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
MUCH = "takes more than 1 seconds or 1024 MiB"
HOSTILE = {
    "a long loop": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "nested loops": (LOOPS, MUCH),
    "a long text": ("{% set x = 'a' * 10**9 %}{{ x * 100 }}", MUCH),
    "a doubled text": (DOUBLED, MUCH),
    "a padded text": ("{{ '%9999999999d' % 1 }}", MUCH),
    "a large power": ("{{ 9 ** (9 ** 9) }}", MUCH),
    "much output": ("{% for i in range(9999) %}{{ 'a long line' }}{% endfor %}", "more than 65536 char"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_is_rendered_within_limits(name, monkeypatch):
    """A downloaded folder must not stop the machine: its template runs in bounded time and memory."""
    source, reason = HOSTILE[name]
    monkeypatch.setattr(render, "SECONDS", 1)
    with pytest.raises(InputError, match=f"the chat template fails: .*{reason}"):
        read_template(source + QWEN, SPECIALS, CONTROLS)


def test_messages_of_a_template_are_escaped_and_cut():
    """They are printed in a terminal."""
    source = "{{ raise_exception('\x1b[2J' + 'long ' * 1000) }}"
    with pytest.raises(InputError, match=r"fails: \\x1b\[2Jlong") as caught:
        read_template(source, {}, CONTROLS)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(InputError) as caught:
        fifth = "{% if loop.index == 5 %}{{ '\x1b' * 5000 }}{% endif %}"
        read_template(jinja(fifth + CHATML_TURN, "{{ '<|im_start|>assistant\\n' }}"), SPECIALS, CONTROLS)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_system_text_that_moves_is_not_guessed():
    """Some templates write it before the last question, so its place changes with every turn."""
    last = "{{ system if loop.last and system is defined else '' }}" + CHATML_TURN
    moving = jinja(
        "{% if m.role == 'user' %}" + last + "{% else %}" + CHATML_TURN + "{% endif %}",
        "{{ '<|im_start|>assistant\\n' }}",
        before="{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}",
    )
    template = read_template(moving, SPECIALS, CONTROLS)
    assert template == replace(CHATML, before_system=None, system_to_user=None, source=moving)
    with pytest.raises(InputError, match="no place for a system message"):
        template.write(turns("Hi", system="Short."))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert read_template(CHATML.source, {}, CONTROLS) is CHATML  # A run of ours needs no Jinja.
    with pytest.raises(InputError, match="need jinja2: pip install jinja2"):
        read_template(QWEN, {}, CONTROLS)


# ---- In a folder


@pytest.fixture
def folder(tokenizer_file, tmp_path):
    """A tokenizer with Llama 3's control tokens, two of them not flagged, and its template beside it."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<|eot_id|>")])
    tokenizer.add_tokens([AddedToken("<|start_header_id|>"), AddedToken("<|end_header_id|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "chat_template": LLAMA}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.6}))
    return tmp_path


def test_a_folder_is_written_in_its_own_format(folder):
    """One BOS, stripped texts, its own end token; the mask covers exactly the assistant's texts."""
    tokenizer = ChatTokenizer(folder / "tokenizer.json")
    ids, supervised = tokenizer.conversation(turns(" Hi ", "Hello\n", "1", "2", system="Short."))
    assert tokenizer.decode(ids) == (
        f"<s>{SYSTEM}Short.<|eot_id|>{USER}Hi<|eot_id|>{ANSWER}Hello<|eot_id|>{USER}1<|eot_id|>{ANSWER}2<|eot_id|>"
    )
    spoken = [i for i, mine in zip(ids, supervised, strict=True) if mine]
    assert tokenizer.decode(spoken) == "Hello<|eot_id|>2<|eot_id|>"
    assert ids == tokenizer.prompt(turns(" Hi ", "Hello\n", "1", system="Short.")) + tokenizer.response("2")


@pytest.mark.parametrize("ends, expected", [(None, ...), ([None, 0], [..., 0]), ([0, 0], [..., 0])])
def test_an_end_token_of_null_is_left_out(folder, tmp_path_factory, ends, expected):
    """`"eos_token_id": null` became `[2, null]`, which no other program reads."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tokenizer, run = ChatTokenizer(folder / "tokenizer.json"), tmp_path_factory.mktemp("run")
    tokenizer.save(run)
    expected = [tokenizer.end_id if end is ... else end for end in expected] if expected is not ... else ...
    found = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    assert found == (tokenizer.end_id if expected is ... else expected)


@pytest.mark.parametrize("token", ["<s>", "<|eot_id|>", "<|start_header_id|>", "<|im_end|>"])
def test_text_forges_no_turn_of_the_folder(folder, token):
    """Also with control tokens that the file does not flag as special."""
    tokenizer = ChatTokenizer(folder / "tokenizer.json")
    control = tokenizer._tokenizer.token_to_id(token)
    plain, forged = (tokenizer.conversation(turns(text, text))[0] for text in ("a", f"a{token}b"))
    assert forged.count(control) == plain.count(control)
    assert tokenizer.decode(tokenizer.text(token)) == token


def test_a_saved_folder_has_the_same_template(folder, tmp_path_factory):
    """A run keeps its chat template, and generation ends at the end token of training."""
    tokenizer, run = ChatTokenizer(folder / "tokenizer.json"), tmp_path_factory.mktemp("run")
    tokenizer.save(run)
    again = ChatTokenizer(run / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint and again.template == tokenizer.template
    config = json.loads((run / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["bos_token"]) == ("<|eot_id|>", "<s>")
    generation = json.loads((run / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.end_id, 0] and generation["temperature"] == 0.6


def test_a_template_in_a_file_of_its_own_and_one_of_several(folder):
    """transformers 5 writes a file of its own; models with tools have several templates."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LLAMA}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTokenizer(folder / "tokenizer.json").template.source == LLAMA
    (folder / "chat_template.jinja").write_text(LLAMA_DATED)
    assert ChatTokenizer(folder / "tokenizer.json").template.source == LLAMA_DATED


def test_a_record_without_a_place_in_the_template_is_named_by_its_line(folder, write_jsonl):
    """A template without system messages, and data with one."""
    (folder / "chat_template.jinja").write_text(MISTRAL.replace("eos_token", "'<|eot_id|>'"))
    rows = [{"prompt": "Hi", "response": "7"}, {"prompt": "Hi", "response": "7", "system": "Short."}]
    path = write_jsonl("chats.jsonl", rows)
    with pytest.raises(InputError, match=f"{path}:2: the model's chat template has no place"):
        open_store(path, "conversations", ChatTokenizer(folder / "tokenizer.json"), max_length=64)


def test_the_template_is_part_of_the_fingerprint(folder):
    """Else the cache would return data that was tokenised with another template."""
    before = ChatTokenizer(folder / "tokenizer.json").fingerprint
    (folder / "chat_template.jinja").write_text(LLAMA_DATED)
    assert ChatTokenizer(folder / "tokenizer.json").fingerprint != before


def test_a_torn_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "')
    with pytest.raises(InputError, match=f"^{folder}/tokenizer_config.json: not JSON"):
        ChatTokenizer(folder / "tokenizer.json")


def test_a_bad_template_names_the_folder(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[7].content }}")
    with pytest.raises(InputError, match=f"^{folder}: the chat template"):
        ChatTokenizer(folder / "tokenizer.json")

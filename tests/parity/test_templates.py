"""Our ids of a conversation and those of the folder's own Jinja template, one by one.

The templates of Qwen and Llama 3 are those that TRL ships; those of SmolLM2, Mistral and Zephyr, which it
does not ship, are written here as the model cards describe them.
"""

from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from tests.conftest import TEXTS, turns
from tests.parity.conftest import byte_level, metaspace, sentencepiece, write_tokenizer

SHIPPED = files("trl") / "chat_templates"
CHATML = ["<|im_start|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ROLES = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER"
    "{% elif message['role'] == 'assistant' %}ASSISTANT"
    "{% else %}{{ raise_exception('user and assistant only') }}{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
)


def by_role(user: str, assistant: str) -> str:
    return ROLES.replace("USER", "{{ " + user + " }}").replace("ASSISTANT", "{{ " + assistant + " }}")


ZEPHYR = (
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Name: how the tokenizer is made, its control tokens, its BOS, the token that ends an answer, the template.
TEMPLATES = {
    "qwen2.5": (byte_level, CHATML, None, "<|im_end|>", "qwen2_5.jinja"),
    "qwen3": (byte_level, [*CHATML, "<think>", "</think>"], None, "<|im_end|>", "qwen3.jinja"),
    "qwen2.5-training": (byte_level, CHATML, None, "<|im_end|>", "qwen2_5_training.jinja"),
    "qwen3-2507": (byte_level, CHATML, None, "<|im_end|>", "qwen3_instruct_2507.jinja"),
    "llama-3": (byte_level, LLAMA, LLAMA[0], "<|eot_id|>", "llama3.jinja"),
    "llama-3.1": (byte_level, LLAMA, LLAMA[0], "<|eot_id|>", "llama3_1.jinja"),
    "llama-3.2": (byte_level, LLAMA, LLAMA[0], "<|eot_id|>", "llama3_2.jinja"),
    "smollm2": (
        byte_level, CHATML, None, "<|im_end|>",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "zephyr": (sentencepiece, ["<s>", "</s>"], "<s>", "</s>", ZEPHYR),
    "zephyr-metaspace": (metaspace, ["<s>", "</s>"], "<s>", "</s>", ZEPHYR),
    "mistral-0.1": (
        sentencepiece, ["<s>", "</s>"], "<s>", "</s>",
        "{{ bos_token }}"
        + by_role("'[INST] ' + message['content'] + ' [/INST]'", "message['content'] + eos_token + ' '"),
    ),
    "mistral-0.2": (
        sentencepiece, ["<s>", "</s>"], "<s>", "</s>",
        "{{ bos_token }}"
        + by_role("'[INST] ' + message['content'] + ' [/INST]'", "' ' + message['content'] + eos_token"),
    ),
    "mistral-0.3": (
        metaspace, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>",
        SYSTEM_FIRST
        + "{{ bos_token }}"
        + by_role(
            "'[INST] ' + (said if loop.first else '') + message['content'] + '[/INST]'",
            "' ' + message['content'] | trim + eos_token",
        ),
    ),
    "mistral-tekken": (
        byte_level, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>",
        "{{ bos_token }}"
        + by_role("'[INST]' + message['content'] + '[/INST]'", "message['content'] + eos_token"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request, tmp_path_factory):
    """Our reader of a folder and transformers', and the folder."""
    make, controls, bos, end, template = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("template")
    if template.endswith(".jinja"):
        template = (SHIPPED / template).read_text(encoding="utf-8")
    tokens = {"eos_token": end, "pad_token": end} | ({"bos_token": bos} if bos else {})
    write_tokenizer(folder, make([token for token in controls if token != end] + [end]), template, **tokens)
    return ChatTokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)


def their_ids(reader, messages: list[Message], ask: bool) -> list[int]:
    # Today's date, which Llama 3.2 would put in, is no part of a training set.
    options = dict(enable_thinking=False, date_string="26 Jul 2024", add_generation_prompt=ask)
    return reader.apply_chat_template([vars(m) for m in messages], return_dict=False, **options)


CONVERSATIONS = {
    "single": turns(TEXTS[0]),
    "single-system": turns("Hello, how are you?", system="Please answer in one sentence."),
    "multi": turns(TEXTS[0], TEXTS[3], "123 + 456?", "The answer is short.", TEXTS[4]),
    "multi-system": turns("Hi", TEXTS[5], "A\nB\n\nC", "Two apples  are left.", "😀?", system="系统\nShort."),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_template(both, name):
    """A space, a line or a system text more than the model was trained with is another question."""
    tokenizer, reader = both
    asked = CONVERSATIONS[name]
    if name.endswith("system") and tokenizer.template.before_system is None:
        with pytest.raises(InputError, match="no place for a system message"):
            tokenizer.prompt(asked)
        return
    assert tokenizer.prompt(asked) == their_ids(reader, asked, ask=True)
    told = [*asked, Message("assistant", "Well, 很好. 7")]
    ids, supervised = tokenizer.conversation(told)
    theirs = their_ids(reader, told, ask=False)
    # Some templates end the last turn with a newline, which nobody has to say.
    assert ids == theirs[: len(ids)] and reader.decode(theirs[len(ids) :]).strip() == ""
    assert ids == tokenizer.prompt(asked) + tokenizer.response(told[-1].content)
    assert ids[-1] == tokenizer.end_id == reader.eos_token_id and supervised[-1]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_only_what_assistants_say_is_supervised(both, name):
    tokenizer, _ = both
    asked = [m for m in CONVERSATIONS[name] if m.role != "system" or tokenizer.template.before_system]
    ids, supervised = tokenizer.conversation([*asked, Message("assistant", "Well, 7")])
    said, mine = [], []
    for token, spoken in zip(ids, supervised, strict=True):
        if spoken:
            mine.append(token)
        if spoken and token == tokenizer.end_id:
            said.append(tokenizer.decode(mine[:-1]).strip())
            mine = []
    assert said == [m.content for m in asked if m.role == "assistant"] + ["Well, 7"] and not mine


def test_what_is_saved_is_read_alike(both, tmp_path):
    """A run folder carries its template on, and transformers reads it there as it did before."""
    tokenizer, reader = both
    tokenizer.save(tmp_path)
    again, theirs = ChatTokenizer(tmp_path / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    for text in TEXTS:
        assert theirs(text)["input_ids"] == reader(text)["input_ids"]
    asked = CONVERSATIONS["multi"]
    assert their_ids(theirs, asked, ask=True) == again.prompt(asked) == tokenizer.prompt(asked)

"""Chat templates as separators: the fixed texts between the messages of a conversation.

A conversation is an optional system message, then user and assistant in turn, so six separators describe a
template. Those of a Hugging Face folder are measured: its Jinja template renders messages with unique words,
and the texts between these words are the separators. The separators must then write other conversations,
with and without a system message, exactly as the template does; else the folder is refused. ChatML, Qwen's
with its default system message, Llama 3, Zephyr and Mistral pass.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dataset.jsonl import show
from dataset.render import Render, renderer
from dataset.turns import Message
from errors import InputError, require

LONGEST_QUOTE = 200  # characters of a template's text in an error message


@dataclass(frozen=True)
class ChatTemplate:
    """The text before a message, by the message before it. A space at its end belongs to the message."""

    before_user: str  # at the start; includes the template's default system message
    before_system: str | None  # at the start; None: the template has no place for a system message
    system_to_user: str | None
    user_to_earlier_answer: str
    user_to_answer: str  # before the last response, given or to be generated
    answer_to_user: str
    end: str  # the control token that ends a response
    stripped: tuple[str, ...]  # the roles whose messages lose the white space around them
    source: str  # the Jinja template

    def separators(self) -> tuple[str, ...]:
        """All texts that the template itself writes."""
        starts = self.before_user, self.before_system or "", self.system_to_user or ""
        answers = self.user_to_earlier_answer, self.user_to_answer
        return *starts, *answers, self.answer_to_user.removeprefix(self.end), self.end

    def separate(self, messages: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Each message with the separator before it, without the end token of a response."""
        messages = list(messages)
        for place, message in enumerate(messages):
            before = messages[place - 1].role if place else "start"
            last = place == len(messages) - 1
            separator = {
                ("start", "system"): self.before_system,
                ("start", "user"): self.before_user,
                ("system", "user"): self.system_to_user,
                ("user", "assistant"): self.user_to_answer if last else self.user_to_earlier_answer,
                ("assistant", "user"): self.answer_to_user.removeprefix(self.end),
            }[before, message.role]
            require(separator is not None, "the model's chat template has no place for a system message")
            yield separator, message

    def content(self, message: Message) -> str:
        return message.content.strip() if message.role in self.stripped else message.content

    def write(self, messages: Iterable[Message]) -> str:
        """The conversation as text, up to the end of its last message."""
        return "".join(
            separator + self.content(message) + self.end * (message.role == "assistant")
            for separator, message in self.separate(messages)
        )


CHATML = ChatTemplate(
    before_user="<|im_start|>user\n",
    before_system="<|im_start|>system\n",
    system_to_user="<|im_end|>\n<|im_start|>user\n",
    user_to_earlier_answer="<|im_end|>\n<|im_start|>assistant\n",
    user_to_answer="<|im_end|>\n<|im_start|>assistant\n",
    answer_to_user="<|im_end|>\n<|im_start|>user\n",
    end="<|im_end|>",
    stripped=(),
    source="{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)


# ---- Measuring a template: messages of words that it does not contain itself


def padded(messages: list[Message], message: Message) -> list[Message]:
    """The conversation with white space around one of its messages."""
    return [replace(m, content=f"  {m.content}  ") if m is message else m for m in messages]


SYSTEM, USER, ANSWER = Message("system", "Qsys0"), Message("user", "Quse1"), Message("assistant", "Qans2")
NEXT_USER, NEXT_ANSWER = Message("user", "Quse3"), Message("assistant", "Qans4")
CONVERSATION = [USER, ANSWER, NEXT_USER, NEXT_ANSWER]
CHECKS = [USER], [USER, ANSWER], [USER, ANSWER, NEXT_USER], [*CONVERSATION, USER]
RENDERED = [
    CONVERSATION,
    *CHECKS,
    *([SYSTEM, *messages] for messages in CHECKS),
    *(padded([USER, ANSWER], message) for message in (USER, ANSWER)),
    padded([SYSTEM, USER], SYSTEM),
]


def read_template(source: str, specials: dict[str, str], controls: list[str]) -> ChatTemplate:
    """The `ChatTemplate` that writes the same text as this Jinja template.

    `specials` are bos_token, eos_token, …, which the template may use; `controls` are the texts of the
    tokenizer's added tokens. Raises `InputError` unless one of them ends a response.
    """
    if source == CHATML.source:
        return CHATML
    render = renderer(source, specials, RENDERED)
    before_user, earlier, answer_to_user, last, _ = between(render, CONVERSATION)
    header = between(render, [USER])[1]
    other = f"the chat template prompts a response with {quote(header)}, but writes {quote(last)} before one"
    require(header.rstrip(" ") == last.rstrip(" "), other)
    ends = [control for control in controls if answer_to_user.startswith(control)]
    found = f"the chat template ends a response with {quote(answer_to_user)}, expected a control token"
    require(ends, found)
    template = ChatTemplate(
        before_user=before_user,
        before_system=None,
        system_to_user=None,
        user_to_earlier_answer=earlier,
        user_to_answer=last,
        answer_to_user=answer_to_user,
        end=max(ends, key=len),
        stripped=tuple(m.role for m in (USER, ANSWER) if is_stripped(render, [USER, ANSWER], m)),
        source=source,
    )
    for messages in CHECKS:
        check(template, render, messages)
    try:
        return with_system(template, render)
    except InputError:  # Some templates refuse a system message, or write it before the last question.
        return template


def with_system(template: ChatTemplate, render: Render) -> ChatTemplate:
    """The template with the separators of a system message; `InputError` if they do not describe it."""
    before_system, system_to_user, _ = between(render, [SYSTEM, USER])
    stripped = template.stripped + ("system",) * is_stripped(render, [SYSTEM, USER], SYSTEM)
    template = replace(
        template, before_system=before_system, system_to_user=system_to_user, stripped=stripped
    )
    for messages in CHECKS:
        check(template, render, [SYSTEM, *messages])
    return template


def between(render: Render, messages: list[Message]) -> list[str]:
    """The texts before, between and after the messages in the rendered conversation."""
    text, parts = render(messages), []
    for message in messages:
        part, found, text = text.partition(message.content)
        require(found, f"the chat template leaves out, changes or moves the {message.role} message")
        parts.append(part)
    return [*parts, text]


def is_stripped(render: Render, messages: list[Message], message: Message) -> bool:
    """Whether the template removes the white space around this message."""
    return f"  {message.content}  " not in render(padded(messages, message))


def check(template: ChatTemplate, render: Render, messages: list[Message]) -> None:
    """Raise `InputError` unless the separators write these messages as the Jinja template does."""
    theirs, ours = render(messages), template.write(messages)
    if messages[-1].role == "user":
        theirs, ours = theirs.rstrip(" "), ours + template.user_to_answer.rstrip(" ")
    else:
        theirs = theirs[: len(ours)]  # The template may write more after the end of a response.
    if theirs != ours:
        both = f"it writes {quote(theirs)}, the separators write {quote(ours)}"
        raise InputError(f"the chat template does more than put separators between messages: {both}")


def quote(text: str) -> str:
    return show(text, LONGEST_QUOTE)

"""Chat templates as their joints: the fixed text that stands between what people say.

A conversation is an optional system text, then user and assistant by turns, so six joints say all of it.
Those of a Hugging Face folder are measured: its Jinja template is rendered with words that can be found
again, and what lies between them are the joints. They must then write other conversations, with and without
a system text, exactly as the template does, or the folder is refused. ChatML, Qwen's with its default system
text, Llama 3, Zephyr and Mistral pass; so does whatever else is joints and contents.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dataset.turns import Message
from errors import InputError


@dataclass(frozen=True)
class ChatTemplate:
    """What stands before a message, by who spoke before. A space at a joint's end belongs to the message."""

    before_user: str  # at the start; holds the default system text where a template has one
    before_system: str | None  # at the start; None: there is no place for a system text
    system_to_user: str | None
    user_to_earlier_answer: str
    user_to_answer: str  # before the last answer, or the one that is asked for
    answer_to_user: str
    end: str  # the control token that ends an answer
    stripped: tuple[str, ...]  # the roles whose texts lose the white space around them
    source: str  # the Jinja template

    def texts(self) -> tuple[str, ...]:
        """All that a template writes by itself."""
        starts = self.before_user, self.before_system or "", self.system_to_user or ""
        answers = self.user_to_earlier_answer, self.user_to_answer
        return *starts, *answers, self.answer_to_user.removeprefix(self.end), self.end

    def joints(self, messages: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Each message with the joint before it, the end of an answer left to the answer."""
        messages = list(messages)
        for place, message in enumerate(messages):
            before = messages[place - 1].role if place else "start"
            last = place == len(messages) - 1
            joint = {
                ("start", "system"): self.before_system,
                ("start", "user"): self.before_user,
                ("system", "user"): self.system_to_user,
                ("user", "assistant"): self.user_to_answer if last else self.user_to_earlier_answer,
                ("assistant", "user"): self.answer_to_user.removeprefix(self.end),
            }[before, message.role]
            if joint is None:
                raise InputError("the model's chat template has no place of its own for a system text")
            yield joint, message

    def content(self, message: Message) -> str:
        return message.content.strip() if message.role in self.stripped else message.content

    def write(self, messages: Iterable[Message]) -> str:
        """The conversation as text, without the end of its last message."""
        return "".join(
            joint + self.content(message) + self.end * (message.role == "assistant")
            for joint, message in self.joints(messages)
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


# What a template is asked to write: words that it will not hold itself.
SYSTEM, USER, ANSWER = Message("system", "Qsys0"), Message("user", "Quse1"), Message("assistant", "Qans2")
AGAIN, REPLY = Message("user", "Quse3"), Message("assistant", "Qans4")
PROBES = [USER], [USER, ANSWER], [USER, ANSWER, AGAIN], [USER, ANSWER, AGAIN, REPLY, USER]
Render = Callable[[list[Message], bool], str]


def read_template(source: str, specials: dict[str, str], controls: list[str]) -> ChatTemplate:
    """The `ChatTemplate` that writes what this Jinja template writes.

    `specials` are bos_token, eos_token, …, which the template may use; `controls` are the texts of the
    tokenizer's added tokens, one of which must end an answer. Raises `InputError` where there is no such one.
    """
    if source == CHATML.source:
        return CHATML
    render = compile_template(source, specials)
    before_user, earlier, answer_to_user, last, _ = between(render, [USER, ANSWER, AGAIN, REPLY], ask=False)
    asked = between(render, [USER], ask=True)[1]
    if asked.rstrip(" ") != last.rstrip(" "):
        raise InputError(f"the chat template asks with {asked!r} and writes answers after {last!r}")
    ends = [control for control in controls if answer_to_user.startswith(control)]
    if not ends:
        raise InputError(f"no control token ends an answer in the chat template, but {answer_to_user!r}")
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
    for probe in PROBES:
        check(template, render, probe)
    try:
        return with_system_text(template, render)
    except InputError:  # Some forbid a system text, or put it before the last question.
        return template


def with_system_text(template: ChatTemplate, render: Render) -> ChatTemplate:
    """The same template with the joints of a system text; `InputError` if that is more than joints."""
    before_system, system_to_user, _ = between(render, [SYSTEM, USER], ask=True)
    stripped = template.stripped + ("system",) * is_stripped(render, [SYSTEM, USER], SYSTEM)
    template = replace(
        template, before_system=before_system, system_to_user=system_to_user, stripped=stripped
    )
    for probe in PROBES:
        check(template, render, [SYSTEM, *probe])
    return template


def between(render: Render, messages: list[Message], ask: bool) -> list[str]:
    """What lies before, between and after the messages in the rendered text."""
    text, parts = render(messages, ask), []
    for message in messages:
        part, found, text = text.partition(message.content)
        if not found:
            raise InputError(f"the chat template leaves out or moves the {message.role} text")
        parts.append(part)
    return [*parts, text]


def is_stripped(render: Render, messages: list[Message], message: Message) -> bool:
    """Whether white space around this message is lost."""
    padded = replace(message, content=f"  {message.content}  ")
    return padded.content not in render([padded if m is message else m for m in messages], False)


def check(template: ChatTemplate, render: Render, messages: list[Message]) -> None:
    """Refuse a template that does not write these messages as the Jinja template does."""
    ask = messages[-1].role == "user"
    theirs, ours = render(messages, ask), template.write(messages)
    if ask:
        ours += template.user_to_answer.rstrip(" ")
        theirs = theirs.rstrip(" ")
    if not (theirs == ours or (not ask and theirs.startswith(ours))):
        raise InputError(f"the chat template is no row of joints: it writes {theirs!r}, and not {ours!r}")


def compile_template(source: str, specials: dict[str, str]) -> Render:
    """A function that renders messages, and the header of an answer if one is asked for, sandboxed."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("chat templates need jinja2, of the extra `hf`: pip install jinja2") from None

    def refuse(reason: str):
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    # Some mark what assistants say for transformers' own mask; the marks are no part of the text.
    source = re.sub(r"({%-?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"({%-?\s*)endgeneration\b", r"\1endif", source)

    def render(messages: list[Message], ask: bool) -> str:
        try:
            # Reasoning is off: answers in data have none. No date is given: ids must not change by the day.
            return environment.from_string(source).render(
                messages=[vars(message) for message in messages],
                add_generation_prompt=ask,
                enable_thinking=False,
                **specials,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"the chat template fails: {error}") from None

    return render

"""Jinja chat templates, rendered in a process of their own with limits on time, memory and output.

A template may loop or allocate without end, and jinja2's sandbox does not prevent that.
"""

import contextlib
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from dataset.turns import Message
from errors import InputError

SECONDS = 10  # of processor time for all conversations
MEMORY = 2**30  # bytes
LONGEST_ERROR = 200  # characters of a template's own message
LONGEST_TEXT = 2**16  # characters of a rendered conversation of a few short messages

Render = Callable[[Iterable[Message]], str]


def renderer(source: str, specials: dict[str, str], conversations: list[list[Message]]) -> Render:
    """A function that returns the text of one of these conversations as the Jinja template writes it.

    The header of a response follows a conversation that ends with a user turn. `specials` are bos_token,
    eos_token, …, which the template may use. The function raises `InputError` where the template fails.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise InputError("chat templates need jinja2: pip install jinja2")
    turns = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
    results = iter(_render_elsewhere(json.dumps([source, specials, turns, SECONDS])))
    texts = {tuple(messages): next(results) for messages in conversations}

    def render(messages: Iterable[Message]) -> str:
        text, error = texts[tuple(messages)]
        if error:
            raise InputError(f"the chat template fails: {error}")
        return text

    return render


@functools.lru_cache(maxsize=64)
def _render_elsewhere(request: str) -> list[tuple[str, str]]:
    """(text, error) of each conversation of the request, one of them empty."""
    command = [sys.executable, "-c", "from dataset.render import main; main()"]
    failed = f"it takes more than {SECONDS} seconds or {MEMORY // 2**20} MiB"
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, encoding="utf-8", timeout=6 * SECONDS,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        return [("", failed)] * len(json.loads(request)[2])
    return json.loads(done.stdout)


def main() -> None:
    """Render the request on standard input; write the results to standard output."""
    source, specials, conversations, seconds = json.loads(sys.stdin.buffer.read())
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str):
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    # Marks around assistant turns, for transformers' loss mask; they are not part of the text.
    source = re.sub(r"({%-?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"({%-?\s*)endgeneration\b", r"\1endif", source)

    def render(messages: list[dict]) -> tuple[str, str]:
        try:
            # No reasoning: responses in data have none. No date is given: ids must not change by the day.
            text = environment.from_string(source).render(
                messages=messages,
                add_generation_prompt=messages[-1]["role"] == "user",
                enable_thinking=False,
                **specials,
            )
        except MemoryError:
            sys.exit(1)
        except Exception as error:  # A template can raise whatever its expressions raise.
            return "", repr(str(error)[:LONGEST_ERROR])[1:-1]
        long = f"it writes more than {LONGEST_TEXT} characters" if len(text) > LONGEST_TEXT else ""
        return "" if long else text, long

    limit_resources(seconds)
    print(json.dumps(list(map(render, conversations))))


def limit_resources(seconds: int) -> None:
    """Limit this process's time and memory, where the system can; the caller's timeout holds everywhere."""
    try:
        import resource
    except ImportError:
        return
    for what, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, MEMORY)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (limit, limit))

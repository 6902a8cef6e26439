"""The playground in headless Chromium: twenty picks and a training on them, faults, hostile text, boxes."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

import train_dpo
import train_sft
from dataset import inspect
from dataset.records import Message
from eval import chat
from eval.common import load_model_and_tokenizer
from eval.playground import Settings, make_server
from model.generate import generate
from tests.browser import Browser, chromium
from tests.conftest import ROOT, save_folder
from tests.ranks import free_port
from tests.runs import command_line
from tests.test_page_in_chromium import FAINT, OUTSIDE
from tests.test_playground import lines, write_answers
from tests.test_report import HOSTILE

pytestmark = pytest.mark.slow

READY = "view?.done === true && !document.querySelector('#compare').hidden"
PICKED = "document.querySelector('#compare').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not chromium():
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def quiet(browser):
    """The browser; the page must not have written an error or opened a dialog at the end of the test."""
    browser.open("about:blank", 1400)  # A page of another test may call a server that has ended.
    browser.errors.clear(), browser.requests.clear()
    browser.call("Network.setExtraHTTPHeaders", headers={"Accept-Language": "en"})
    yield browser
    assert browser.errors == []


@pytest.fixture
def serve(folders, tmp_path):
    """A function that serves the playground with these settings; yields the server and its address."""

    @contextmanager
    def serving(**changes):
        settings = dict(model=folders[0], versus=folders[1], out=str(tmp_path / "picks.jsonl"), port=0,
                        device="cpu", max_new_tokens=8)  # fmt: skip
        with make_server(Settings(**{**settings, **changes})) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield server, f"http://127.0.0.1:{server.server_port}/"
            server.shutdown()

    return serving


@pytest.fixture
def script(monkeypatch):
    """Replace the answers of both models: a function of the message that returns pieces of text."""

    def replace(answer) -> None:
        def reply(self, uniforms, **sampling):
            yield from answer(self.history[-1].content)

        monkeypatch.setattr(chat.Conversation, "reply", reply)

    replace(lambda text: [f"{random.random():.6f} ", "is an answer to ", text])
    return replace


def until(browser, expression: str, seconds: float = 60):
    """The value of the expression as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := browser.run(expression)):
        assert time.monotonic() < end, (expression, browser.errors, browser.run("document.body.innerText"))
        time.sleep(0.02)
    return found


def say(browser, text: str) -> None:
    """Type a message and press Enter, as a person does."""
    until(browser, "!document.querySelector('#form').hidden && !document.body.hidden")
    browser.run("document.querySelector('#text').focus()")
    browser.call("Input.insertText", text=text)
    browser.press("Enter")


def answer(browser, text: str) -> list[str]:
    """Send a message; the two complete answers."""
    say(browser, text)
    until(browser, READY)
    return browser.run("answers.map((answer) => answer.textContent)")


def pick(browser, choice: str) -> None:
    browser.run(f"document.querySelector('[data-choice={choice}]').click()")
    until(browser, PICKED)


def count(browser) -> str:
    return browser.run("document.querySelector('#count').textContent")


# ---- From nothing to a model with another manner


@pytest.fixture(scope="module")
def two_manners(tokenizer, tmp_path_factory) -> str:
    """A model that answers "Hello 123" in a short or in a long manner, half of the time each."""
    folder = tmp_path_factory.mktemp("manners")
    save_folder(folder / "start", tokenizer, hidden_size=48, intermediate_size=96, spread=0.0)
    numbers = random.Random(0)
    chats = [{"prompt": f"Hello {numbers.randrange(1000)}", "response": response}
             for _ in range(200) for response in ("Hello.", "Thank you, hello again.")]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    train_sft.main(command_line(
        model=folder / "start", data=folder / "chats.jsonl", out=folder / "sft", lr=3e-3, epochs=7,
        batch_size=32, device="cpu", precision="fp32", optimizer="adamw",
    ))  # fmt: skip
    return str(folder / "sft")


def share_of_short(folder: str) -> float:
    """The share of short answers among 200 samples to messages that no pick has."""
    model, tokenizer = load_model_and_tokenizer(folder, torch.device("cpu"))
    prompts = [tokenizer.prompt([Message("user", f"Hello {number}")]) for number in range(1000, 1200)]
    found = generate(model, prompts, tokenizer.end_id, max_new_tokens=16, seed=5)
    return sum(one.finished and len(tokenizer.decode(one.tokens)) < 10 for one in found) / len(found)


def test_twenty_picks_by_a_taste_make_it_likelier(quiet, serve, two_manners, tmp_path, capsys, monkeypatch):
    """The whole way of a person: talk, pick the shorter answer, copy the command, train, ask again."""
    with serve(model=two_manners, versus="", max_new_tokens=24, temperature=1.0) as (server, address):
        quiet.open(address, 1400)
        quiet.run("sessionStorage.clear(); 1"), quiet.open(address, 1400)
        asked = 0
        while len(lines(server.play.picks.pairs)) < 20:
            asked += 1
            assert asked < 100
            texts = answer(quiet, f"Hello {asked}")
            pickable = zip(map(len, texts), ("left", "right"), quiet.run("view.pickable"), strict=True)
            sizes = [(size, side) for size, side, is_pickable in pickable if is_pickable]
            pick(quiet, min(sizes, default=(0, "bad"))[1])
            quiet.run("document.querySelector('#fresh').click()")
        assert count(quiet).startswith("Picks: 20, ")
        command = quiet.run("document.querySelector('#command').textContent")
    assert inspect.main([str(tmp_path / "picks.jsonl"), "--tokenizer", f"{two_manners}/tokenizer.json"]) == 0
    monkeypatch.chdir(ROOT)
    _, script, *arguments = shlex.split(command)
    assert script == "train_dpo.py"
    train_dpo.main([*arguments, "--device", "cpu", "--precision", "fp32"])
    before, after = share_of_short(two_manners), share_of_short(f"{two_manners}-picks")
    print(f"short answers: {before:.0%} before, {after:.0%} after {asked} messages")
    assert 0.25 < before < 0.75 and after > before + 0.2


# ---- Faults


def test_a_reload_in_mid_answer_goes_on(quiet, serve, script):
    """The tab shows what there is and follows the rest; the answers are not generated anew."""
    gate = threading.Event()

    def slow(text):
        yield "The beginning"
        gate.wait(60)
        yield f" and the end {random.random()}"

    script(slow)
    with serve() as (server, address):
        quiet.open(address, 1400)
        say(quiet, "Hello")
        until(quiet, "view?.texts[0] === 'The beginning'")
        quiet.open(address, 1400)
        until(quiet, "view?.texts[0] === 'The beginning'")
        assert quiet.run("document.querySelector('#turns').textContent") == "Hello"
        assert quiet.run("choices.every((button) => button.disabled)"), "incomplete answers cannot be picked"
        gate.set()
        until(quiet, READY)
        (comparison,) = server.play.comparisons.values()  # Blink closes a stream with an error: not lost.
        assert quiet.run("answers.map((answer) => answer.textContent)") == comparison.texts
        pick(quiet, "right")
        quiet.open(address, 1400)
        until(quiet, "!document.body.hidden")
        shown = quiet.run("[...document.querySelectorAll('.turn')].map((turn) => turn.textContent)")
        assert shown == ["Hello", comparison.texts[1]] and count(quiet) == "Picks: 1, both bad: 0"


def test_a_killed_server_loses_no_pick(browser, folders, tmp_path):
    """SIGKILL after a pick; the page reports a server that is gone, and goes on with the next one."""
    port, out = free_port(), tmp_path / "picks.jsonl"
    command = [sys.executable, "-m", "eval.playground"]
    command += command_line(
        model=folders[0], out=out, port=port, device="cpu", max_new_tokens=40, temperature=1
    )  # fmt: skip

    def start() -> subprocess.Popen:
        server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        while "open http" not in server.stderr.readline():
            assert server.poll() is None
        return server

    browser.call("Network.setExtraHTTPHeaders", headers={"Accept-Language": "en"})
    first = start()
    try:
        browser.open(f"http://127.0.0.1:{port}/", 1400)
        asked = 0
        while not out.exists():  # A random model rarely ends its answer.
            asked += 1
            assert asked < 100
            answer(browser, f"Hello {asked}")
            if choice := browser.run("choices.find((button) => !button.disabled)?.dataset.choice"):
                pick(browser, choice)
            if choice in (None, "bad"):
                browser.run("document.querySelector('#fresh').click()")
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert len(lines(out)) == 1
        before = browser.run("tab.messages.map((turn) => turn.content)")
        say(browser, "Are you there?")
        note = "document.querySelector('#note').textContent"
        until(browser, f"{note}.includes('does not answer')")
        assert browser.run("document.querySelector('#text').value") == "Are you there?"
        second = start()
        try:
            browser.press("Enter")
            until(browser, READY)
            assert count(browser).startswith("Picks: 1,")
            assert before == browser.run("tab.messages.slice(0, -1).map((turn) => turn.content)")
        finally:
            second.kill(), second.wait()
    finally:
        first.kill(), first.wait()


def test_two_tabs_are_two_conversations_and_lose_no_pick(quiet, serve, script):
    with serve() as (server, address):
        quiet.open(address, 1400)
        session, first = quiet.session, answer(quiet, "One")
        quiet.session = None
        target = quiet.call("Target.createTarget", url="about:blank")["targetId"]
        quiet.session = quiet.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            quiet.call(f"{domain}.enable")
        try:
            quiet.open(address, 1400)
            second = answer(quiet, "Two")
            pick(quiet, "left")
        finally:
            here, quiet.session = quiet.session, session
        assert first != second
        pick(quiet, "bad")
        assert count(quiet) == "Picks: 1, both bad: 1", "the count of both tabs"
        assert quiet.run("document.querySelector('#text').value") == "One"
        quiet.session = here
        assert quiet.run("[...document.querySelectorAll('.turn')].map((turn) => turn.textContent)") == [
            "Two", second[0]
        ]  # fmt: skip
        quiet.session = None
        quiet.call("Target.closeTarget", targetId=target)
        quiet.session = session
        assert lines(server.play.picks.pairs)[0]["chosen"] == second[0]


def test_hostile_text_runs_nothing(quiet, serve, script, tmp_path):
    """In messages, in answers, in a file: no element of its making, no dialog, no request, no error."""
    script(lambda text: [HOSTILE, str(random.random())])
    prompt = f"{HOSTILE}\n{HOSTILE}"
    file = write_answers(tmp_path / "answers.jsonl", (prompt, HOSTILE, f"{HOSTILE}2"))
    with serve(answers=file) as (_, address):
        quiet.open(address, 1400)
        assert all("onerror=alert(1)" in text for text in answer(quiet, HOSTILE))
        pick(quiet, "left")
        quiet.open(f"{address}rank", 1400)
        until(quiet, READY)
        shown = "[document.images.length, document.scripts.length, document.links.length, document.title]"
        assert quiet.run(shown) == [0, 1, 2, "MiniDPO playground"]
        assert quiet.run("document.querySelector('.turn').textContent") == prompt
        assert all(request.startswith((address, "data:,")) for request in quiet.requests)


def test_another_origin_can_neither_read_nor_write(browser, serve, script):
    """From a page of another server here, whose own policy is off: only its origin is in the way."""
    with serve() as (server, address), serve(out="other.jsonl") as (_, elsewhere):
        browser.call("Page.setBypassCSP", enabled=True)
        browser.open(elsewhere, 1400)
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
        for options in ({}, {"mode": "no-cors"}, {"headers": {"Content-Type": "application/json"}}):
            options = {"method": "POST", "body": body, **options}
            call = f"fetch('{address}ask', {json.dumps(options)}).then((r) => r.text(), () => '')"
            assert browser.run(call) == ""
        assert browser.run(f"fetch('{address}state').then((r) => r.text(), () => '')") == ""
        browser.call("Page.setBypassCSP", enabled=False)
        assert not server.play.comparisons
    browser.errors.clear()  # of the refused requests


# ---- Looks


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_is_in_its_box_and_readable(quiet, serve, script, tmp_path, language, width, dark):
    long = "Donaudampfschifffahrtsgesellschaft" * 6 + " 苹果" * 30
    script(lambda text: [long, str(random.random())])
    file = write_answers(tmp_path / "answers.jsonl", (long, long, f"{long}2"))
    out = tmp_path / f"{'long-name-' * 12}.jsonl"
    with serve(answers=file, lang=language, out=str(out)) as (_, address):
        quiet.open(address, width, dark=dark)
        answer(quiet, long)
        assert quiet.run(OUTSIDE) == [] and quiet.run(FAINT)[1] == []
        pick(quiet, "left")
        assert quiet.run(OUTSIDE) == [] and quiet.run(FAINT)[1] == []
        quiet.open(f"{address}rank", width, dark=dark)
        until(quiet, READY)
        assert quiet.run(OUTSIDE) == [] and quiet.run(FAINT)[1] == []
        english = quiet.run("document.querySelector('[data-choice=bad]').textContent") == "Both are bad"
        assert english is (language == "en") and quiet.run("document.documentElement.lang") == (
            "en" if english else "zh-CN"
        )


def test_every_control_works_with_the_keyboard(quiet, serve, script):
    """Enter sends; Shift+Enter and the Enter of an input method do not; Tab reaches each button."""
    with serve() as (_, address):
        quiet.open(address, 1400)
        until(quiet, "!document.body.hidden")
        quiet.run("document.querySelector('#text').focus()")
        quiet.call("Input.insertText", text="nihao")
        enter = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...%s})"
        for keys in ({"isComposing": True}, {"shiftKey": True}):
            quiet.run(f"document.querySelector('#text').dispatchEvent({enter % json.dumps(keys)})")
        assert quiet.run("tab.id") == ""
        quiet.press("Enter")
        until(quiet, READY)
        seen = []
        for _ in range(8):
            quiet.press("Tab")
            seen.append(quiet.run("document.activeElement.textContent"))
        names = {"A is better", "B is better", "Both are bad", "Two other answers", "New conversation"}
        assert names <= {*seen}

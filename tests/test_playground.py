"""The server of eval/playground.py without a browser, and the files of eval/picks.py."""

import errno
import json
import os
import re
import shlex
import threading
from collections import Counter
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train_dpo
from dataset import inspect
from dataset.records import Preference, read_preferences
from errors import InputError
from eval import chat, playground
from eval.page import digest
from eval.picks import Picks
from eval.playground import Settings, make_server
from training.settings import parse

HELLO = [{"role": "user", "content": "Hello"}]


class Client:
    """Requests as the page sends them; `headers` replace some of its headers, None leaves one out."""

    def __init__(self, server):
        self.play, self.port = server.play, server.server_port

    def send(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, bytes]:
        here = f"127.0.0.1:{self.port}"
        sent = {"Host": here, "Origin": f"http://{here}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {k: v for k, v in sent.items() if v is not None})
        reply = connection.getresponse()
        self.headers = reply.headers
        found = reply.status, reply.read()
        connection.close()
        return found

    def post(self, path: str, **body) -> dict:
        status, reply = self.send("POST", path, json.dumps(body).encode())
        assert status == 200, reply
        return json.loads(reply)

    def refused(self, path: str, **body) -> str:
        status, reply = self.send("POST", path, json.dumps(body).encode())
        assert status == 400
        return json.loads(reply)["error"]

    def state(self, **headers) -> dict:
        return json.loads(self.send("GET", "/state", **headers)[1])

    def views(self, id: str) -> list[dict]:
        """All that the page gets to show of a comparison."""
        status, events = self.send("GET", f"/stream?id={id}")
        assert status == 200 and self.headers["Content-Type"].startswith("text/event-stream")
        return [json.loads(event.removeprefix("data: ")) for event in events.decode().split("\n\n")[:-1]]

    def ask(self, messages=HELLO) -> tuple[str, list[str]]:
        """The id and the texts of two complete answers."""
        id = self.post("/ask", messages=messages)["id"]
        return id, self.views(id)[-1]["texts"]

    def pick(self, choice: str = "left", messages=HELLO) -> dict:
        return self.post("/pick", id=self.ask(messages)[0], choice=choice)


@pytest.fixture
def serve(folders, tmp_path):
    """A function that starts a server with these settings until the end of the block; yields a `Client`."""

    @contextmanager
    def serving(**changes):
        settings = dict(model=folders[0], versus=folders[1], out=str(tmp_path / "picks.jsonl"), port=0,
                        device="cpu", max_new_tokens=8)  # fmt: skip
        with make_server(Settings(**{**settings, **changes})) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield Client(server)
            server.shutdown()

    return serving


@pytest.fixture
def scripted(monkeypatch, folders):
    """A function that replaces the models' answers: by folder, a text or a list of pieces."""

    def script(client: Client, **texts) -> None:
        by_model = {id(one.model): texts[("first", "second")[folders.index(name)]]
                    for name, one in client.play.conversations}  # fmt: skip

        def reply(self, uniforms, **sampling):
            yield from by_model[id(self.model)]

        monkeypatch.setattr(chat.Conversation, "reply", reply)

    return script


FIRST, SECOND = ["The ", "first."], ["The ", "second."]


@pytest.fixture
def client(serve, scripted):
    with serve() as client:
        scripted(client, first=FIRST, second=SECOND)
        yield client


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()] if path.exists() else []


# ---- Talking


def test_both_answers_are_streamed_and_are_those_of_the_models(serve, folders):
    """Each event has all text so far; the last one equals the answers of eval.chat with these numbers."""
    with serve() as client:
        id = client.post("/ask", messages=HELLO)["id"]
        views = client.views(id)
        comparison = client.play.comparisons[id]
        uniforms = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
        sampling = {"temperature": 0.7, "top_p": 1.0, "top_k": 0}
        conversations = dict(client.play.conversations)
        for side, name in enumerate(comparison.models):
            one = conversations[name]
            alone = chat.Conversation(one.model, one.tokenizer, 1000, [chat.Message("user", "Hello")])
            texts = [view["texts"][side] for view in views]
            assert texts[-1] == "".join(alone.reply(uniforms[[side]], **sampling)) != ""
            assert all(after.startswith(before) for before, after in pairwise(texts))
    assert sorted(comparison.models) == sorted(folders)
    assert [view["done"] for view in views] == [False] * (len(views) - 1) + [True]


def test_a_reload_gets_the_answers_again(client):
    id, texts = client.ask()
    assert client.views(id)[-1]["texts"] == texts


def test_the_order_is_random_and_the_record_names_the_model_of_its_text(client, folders):
    """Were the policy always A, a person who likes A would train it on nothing. Two in 10^9 runs fail."""
    left, chosen = set(), Counter()
    for number in range(30):
        id, texts = client.ask()
        left.add(texts[0])
        chosen[client.post("/pick", id=id, choice=("left", "right")[number % 2])["chosen"]] += 1
    assert left == {"The first.", "The second."}
    named = {"The first.": folders[0], "The second.": folders[1]}
    for record in lines(client.play.picks.pairs):
        assert record["model_chosen"] == named[record["chosen"]]
        assert record["model_rejected"] == named[record["rejected"]]
    assert dict(client.state()["wins"]) == {named[text]: count for text, count in chosen.items()}


def test_nothing_names_the_models_before_the_pick(client, folders):
    client.post("/ask", messages=HELLO)
    id = client.post("/ask", messages=HELLO)["id"]
    shown = json.dumps([client.views(id), client.state()["wins"]])
    assert not any(folder in shown for folder in folders)
    models = client.post("/pick", id=id, choice="right")["models"]
    assert sorted(models) == ["left", "right"] and sorted(models.values()) == sorted(folders)


def test_one_model_gives_two_different_samples(serve):
    with serve(versus="", temperature=1.0) as client:
        _, texts = client.ask()
        assert texts[0] != texts[1]
    with pytest.raises(InputError, match="--temperature must be above 0 without --versus"):
        Settings(temperature=0)


def test_both_models_read_the_same_messages(serve, scripted, tokenizer):
    """The oldest turns are left out until the prompt fits the model with less room."""
    turn = [*HELLO, {"role": "assistant", "content": "Hello, hello."}]
    with serve(system="Be brief.") as client:
        scripted(client, first=FIRST, second=SECOND)
        whole = client.post("/ask", messages=turn + HELLO)
        prompt = client.play.comparisons[whole["id"]].prompt
        assert [m.role for m in prompt] == ["system", "user", "assistant", "user"]
        assert [m["role"] for m in whole["messages"]] == ["user", "assistant", "user"]
        client.play.conversations[0][1].max_prompt = len(tokenizer.prompt(prompt)) - 1
        short = client.post("/ask", messages=turn + HELLO)
        assert len(short["messages"]) == 1 and client.views(short["id"])
        reply = client.post("/pick", id=short["id"], choice="left")
        assert [m["role"] for m in lines(client.play.picks.pairs)[-1]["prompt"]] == ["system", "user"]
        assert reply["chosen"] in ("The first.", "The second.")
        client.play.conversations[0][1].max_prompt = 3
        assert "more than 3" in client.refused("/ask", messages=HELLO)


# ---- Picks


def test_picks_are_pairs_that_training_takes(client, capsys):
    history = [*HELLO, {"role": "assistant", "content": "苹果 \u2028"}, *HELLO]
    client.pick("left"), client.pick("right", history), client.pick("bad")
    pairs = [*read_preferences(client.play.picks.pairs)]
    assert all(isinstance(pair, Preference) for pair in pairs)
    assert [m.content for m in pairs[1].prompt] == ["Hello", "苹果 \u2028", "Hello"]
    assert {pairs[1].chosen, pairs[1].rejected} == {"The first.", "The second."}
    assert inspect.main([str(client.play.picks.pairs), "--no-colour"]) == 0
    bad = lines(client.play.picks.bad)
    assert [record["label"] for record in bad] == [False, False] and bad[0]["prompt"] == HELLO
    assert {record["completion"] for record in bad} == {"The first.", "The second."}
    state = client.state()
    assert (state["picks"], state["bad"]) == (2, 1)


def test_the_command_is_one_that_train_dpo_takes(serve, scripted, folders, tmp_path):
    """Paths with spaces are quoted, and --out does not exist: a command that fails would train nobody."""
    with serve(out=str(tmp_path / "my picks.jsonl")) as client:
        scripted(client, first=FIRST, second=SECOND)
        client.pick("left")
        program, script, *arguments = shlex.split(client.state()["command"])
    settings = parse(train_dpo.Settings, "", arguments)
    assert (program, script) == ("python", "train_dpo.py")
    assert (settings.model, settings.data) == (folders[0], str(tmp_path / "my picks.jsonl"))
    assert not Path(settings.out).exists()
    for name in ("a", "a-picks", "a-picks-2"):
        (tmp_path / name).mkdir()
    assert f"--out {tmp_path}/a-picks-3 " in playground.train_command(f"{tmp_path}/a/", "p.jsonl", 1)


def test_a_pick_is_on_the_disk_before_its_reply(client, monkeypatch):
    """With a full disk the pick is refused and can be sent again; the file never has half a line."""
    client.pick("left")
    before, fsync = client.play.picks.pairs.read_bytes(), os.fsync
    id, _ = client.ask()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "picks.jsonl: cannot be written (No space left" in client.refused("/pick", id=id, choice="left")
    assert client.play.picks.pairs.read_bytes() == before and client.state()["picks"] == 1
    monkeypatch.setattr(os, "fsync", fsync)
    assert client.post("/pick", id=id, choice="left")["state"]["picks"] == 2
    assert len(lines(client.play.picks.pairs)) == 2


def test_two_tabs_or_a_second_click_save_one_pick(client):
    id, _ = client.ask()
    found: list[dict] = []

    def send(choice: str) -> None:
        found.append(client.post("/pick", id=id, choice=choice))

    tabs = [threading.Thread(target=send, args=(choice,)) for choice in ("left", "right", "bad", "left")]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert len({reply["chosen"] for reply in found}) == 1
    pairs, bad = lines(client.play.picks.pairs), lines(client.play.picks.bad)
    assert (len(pairs), len(bad)) in [(1, 0), (0, 2)] and {record["id"] for record in pairs + bad} == {id}


def test_picks_outlive_the_server(serve, scripted):
    """After a restart the count is right, and a pick whose reply was lost is not saved a second time."""
    with serve() as client:
        scripted(client, first=FIRST, second=SECOND)
        id, _ = client.ask()
        chosen = client.post("/pick", id=id, choice="left")["chosen"]
        client.pick("bad")
        other, _ = client.ask()
    with serve() as client:
        scripted(client, first=FIRST, second=SECOND)
        assert [client.state()[name] for name in ("picks", "bad")] == [1, 1]
        assert client.post("/pick", id=id, choice="right")["chosen"] == chosen
        assert len(lines(client.play.picks.pairs)) == 1
        assert client.views(other) == [{"gone": True}]
        assert "was restarted" in client.refused("/pick", id=other, choice="left")


@pytest.mark.parametrize("tail, ids, removed", [
    (b"", "a", False), (b'{"prompt": "x", "cho', "a", True), ('{"prompt": "苹'.encode()[:-1], "a", True),
    (b'{"prompt": "x", "chosen": "y", "rejected": "z", "id": "b"}', "ab", False),
])  # fmt: skip
def test_a_line_that_a_crash_has_cut_is_removed(tail, ids, removed, tmp_path, capsys):
    """Its pick was never confirmed; left there, it would spoil the next pick and stop the training."""
    path = tmp_path / "picks.jsonl"
    whole = b'{"prompt": "x", "chosen": "y", "rejected": "z", "id": "a"}\n'
    path.write_bytes(whole + tail)
    picks = Picks(str(path))
    assert [*picks.records] == [*ids]
    picks.add({"prompt": "x", "chosen": "1", "rejected": "2", "id": "c"})
    assert [record["id"] for record in lines(path)] == [*ids, "c"]
    assert ("removed an incomplete last line" in capsys.readouterr().err) is removed


@pytest.mark.parametrize("content, reason", [
    ('{"prompt": "x"}\n', "picks.jsonl:1: not a pick; give another file"),
    ("[]\n", "picks.jsonl:1: not a pick"),
    ('{"a": 1\n{"prompt": "x", "chosen": "y"}\n', "picks.jsonl:1: invalid JSON"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_at_the_start(content, reason, tmp_path):
    path = tmp_path / "picks.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(reason)):
        Picks(str(path))
    assert path.read_text() == content


@pytest.mark.parametrize("first, second, note", [
    (["Same."], ["Same."], "answers are equal"), (["Good."], [" \n"], "is empty"),
])  # fmt: skip
def test_answers_that_make_no_pair_are_not_saved(serve, scripted, first, second, note):
    """The reader of pairs stops at an empty answer, and two equal ones have no gradient."""
    with serve() as client:
        scripted(client, first=first, second=second)
        id = client.post("/ask", messages=HELLO)["id"]
        side = ("left", "right")[not client.views(id)[-1]["pickable"][0]]
        reply = client.post("/pick", id=id, choice=side)
        assert note in reply["note"] and reply["chosen"] == first[0] and reply["state"]["picks"] == 0
        if second[0].isspace():
            other = {"left": "right", "right": "left"}[side]
            assert "cannot be picked" in client.refused("/pick", id=id, choice=other)
            assert note in client.post("/pick", id=id, choice="bad")["note"]
        assert not client.play.picks.pairs.exists() and not client.play.picks.bad.exists()


def test_an_answer_that_was_cut_off_cannot_be_picked(serve, scripted):
    """Training adds the end token, so the model would learn to stop in the middle of a sentence."""
    with serve() as client:
        scripted(client, first=[*"12345678", ""], second=[*"1234567", ""])  # 8 tokens, and 7 with an end
        id = client.post("/ask", messages=HELLO)["id"]
        view = client.views(id)[-1]
        cut = view["texts"].index("12345678")
        assert view["pickable"] == [cut == 1, cut == 0] and "--max-new-tokens" in view["note"]
        assert "cannot be picked" in client.refused("/pick", id=id, choice=("left", "right")[cut])
        assert client.post("/pick", id=id, choice=("right", "left")[cut])["state"]["picks"] == 1


def test_a_model_that_fails_is_reported(serve, monkeypatch):
    def fail(self, uniforms, **sampling):
        yield "Well"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serve() as client:
        monkeypatch.setattr(chat.Conversation, "reply", fail)
        id = client.post("/ask", messages=HELLO)["id"]
        view = client.views(id)[-1]
        assert view["note"] == "RuntimeError: out of memory" and view["pickable"] == [False, False]


# ---- Who may ask, and for what


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example", "Origin": None}, {"Host": "127.0.0.1"},
    {"Host": "127.0.0.1:1"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
])  # fmt: skip
def test_other_hosts_and_origins_are_refused(client, headers):
    """A page elsewhere must not read answers or add picks, under a host name of its own either."""
    id, _ = client.ask()
    count = len(client.play.comparisons)
    for method, path, body in (
        ("GET", "/", None), ("GET", "/state", None), ("GET", f"/stream?id={id}", None),
        ("POST", "/ask", {"messages": HELLO}), ("POST", "/pick", {"id": id, "choice": "left"}),
    ):  # fmt: skip
        status, reply = client.send(method, path, body and json.dumps(body).encode(), **headers)
        assert status == 403 and b"own page only" in reply
    assert len(client.play.comparisons) == count and not client.play.picks.pairs.exists()


@pytest.mark.parametrize("headers", [{"Origin": None}, {"Content_Type": "text/plain"}])
def test_a_form_of_another_page_is_refused(client, headers):
    """A form, or fetch without leave (CORS), cannot send JSON; each browser sends Origin with a POST."""
    body = json.dumps({"messages": HELLO}).encode()
    assert client.send("POST", "/ask", body, **headers)[0] == 403 and not client.play.comparisons
    assert client.send("GET", "/", Origin=None)[0] == 200, "a link, or an address that was typed"


def test_the_server_is_on_this_machine_only(serve):
    with serve() as client:
        here = f"localhost:{client.port}"
        assert client.send("GET", "/state", Host=here, Origin=f"http://{here}")[0] == 200
        assert client.send("GET", "/state", Host=here)[0] == 403, "localhost is another origin than 127.0.0.1"
        with pytest.raises(InputError, match=f"--port {client.port} cannot be used .*give another one"):
            serve(port=client.port).__enter__()
    assert playground.HOST == "127.0.0.1"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("path, body, reason", [
    ("/ask", b"{", "Expecting property name"),
    ("/ask", b"[" * 100_000, "recursion"),
    ("/ask", b"{}", "messages"),
    ("/ask", b"[1]", "indices must be"),
    ("/ask", b'{"messages": []}', "an empty list"),
    ("/ask", json.dumps({"messages": [USER, USER]}).encode(), "turn 1 is user"),
    ("/ask", b'{"messages": [{"role": "assistant", "content": "x"}]}', "expected user"),
    ("/ask", b'{"messages": [{"role": "user", "content": " "}]}', "is empty"),
    ("/ask", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    ("/ask", b"\xff{}", "utf-8"),
    ("/pick", b'{"id": ["x"], "choice": "left"}', "unhashable"),
    ("/pick", b'{"id": "x", "choice": "left"}', "was restarted"),
])  # fmt: skip
def test_bad_requests_are_refused_and_the_server_goes_on(client, path, body, reason):
    status, reply = client.send("POST", path, body)
    assert status == 400 and reason in json.loads(reply)["error"]
    assert client.pick("left")["state"]["picks"] == 1


def test_requests_have_limits(client):
    assert client.send("POST", "/ask", b"{}", Content_Length=str(2**20 + 1))[0] == 413
    assert client.send("POST", "/ask", b"{}", Content_Length="x")[0] == 413
    assert client.send("POST", "/nowhere", b"{}")[0] == client.send("GET", "/../files.py")[0] == 404
    id, _ = client.ask()
    assert "expected left, right or bad" in client.refused("/pick", id=id, choice="middle")


# ---- The page


def test_only_the_scripts_and_styles_of_the_page_run(client):
    """The policy has their digests, so a script in a text that slipped through would not run."""
    page = client.send("GET", "/")[1].decode()
    policy = client.headers["Content-Security-Policy"]
    blocks = {tag: re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S) for tag in ("script", "style")}
    for tag, found in blocks.items():
        assert len(found) == 1 and f"{tag}-src {digest(found[0])};" in policy
        page = page.replace(found[0], "")
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"\son\w+=|\sstyle=|https?:", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", blocks["script"][0])
    assert client.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("lang, header, shown", [
    ("auto", "zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"), ("auto", "en-US,zh", "en"), ("auto", None, "en"),
    ("zh", "en", "zh-CN"), ("en", "zh", "en"),
])  # fmt: skip
def test_the_language_is_that_of_the_browser_or_of_the_flag(serve, lang, header, shown):
    with serve(lang=lang) as client:
        state = client.state(Accept_Language=header)
        assert state["language"] == shown
        assert state["words"].get("Both are bad", "") == ("两个都不好" if shown == "zh-CN" else "")


# ---- Ranking a file


def write_answers(path, *prompts: tuple) -> str:
    """A file of eval.sample: for each prompt its answers, which are texts or records."""
    records = [
        {"prompt": [{"role": "user", "content": prompt}],
         "answers": [{"text": a} if isinstance(a, str) else a for a in answers]}
        for prompt, *answers in prompts
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_each_pair_of_a_file_is_ranked_once(serve, tmp_path):
    """First one pair of each prompt; no equal, empty or wholly unfinished ones; a restart goes on."""
    half = [{"text": text, "finished": False} for text in ("c", "d")]
    prompts = ("p", "1", "2", "3", "3", " "), ("q", "a", "b"), ("r", *half)
    file = write_answers(tmp_path / "answers.jsonl", *prompts)
    seen, order = [], []
    for count in (2, 9):
        with serve(answers=file) as client:
            assert client.state()["ranking"]
            for _ in range(count):
                found = client.post("/next")
                if not found["id"]:
                    break
                (view,) = client.views(found["id"])
                order.append(found["messages"][0]["content"])
                seen.append("".join(sorted(view["texts"])))
                client.post("/pick", id=found["id"], choice="bad" if len(seen) == 2 else "left")
    assert sorted(seen) == ["12", "13", "23", "ab"] and sorted(order[:2]) == ["p", "q"]
    pairs = lines(tmp_path / "picks.jsonl")
    assert len(pairs) == 3 and {record["prompt"][0]["content"] for record in pairs} <= {"p", "q"}
    assert len(lines(tmp_path / "picks.bad.jsonl")) == 2


def test_a_skipped_pair_comes_again_and_sides_change(serve, tmp_path):
    file = write_answers(tmp_path / "answers.jsonl", ("p", "1", "2"), ("q", "a", "b"))
    with serve(answers=file) as client:
        ids = [client.post("/next")["id"] for _ in range(4)]
        assert ids[:2] == ids[2:] and ids[0] != ids[1]
    many = write_answers(tmp_path / "many.jsonl", *[(str(i), f"{i}a", f"{i}b") for i in range(30)])
    with serve(answers=many) as client:
        left = [client.views(client.post("/next")["id"])[0]["texts"][0][-1] for _ in range(30)]
    assert {*left} == {"a", "b"}


def test_an_answers_file_that_cannot_be_used_is_refused(serve, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"prompt": [{"role": "robot"}], "answers": [{"text": "x"}]}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl: record 1: prompt\[0\]"), \
            serve(answers=str(tmp_path / "answers.jsonl")):  # fmt: skip
        pass

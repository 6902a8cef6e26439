"""Pick the better of two answers in the browser; the picks are preference pairs for train_dpo.py.

    python -m eval.playground --model runs/sft                       # two samples of one model
    python -m eval.playground --model runs/dpo --versus runs/sft     # two models; which is which is hidden
    python -m eval.playground --model runs/sft --answers answers.jsonl   # also a page for the pairs of a file

The page is on this machine only (127.0.0.1). Both models answer the same conversation, and the picked answer
continues it. Picks go to --out, one JSON line each, on the disk before the page shows them. "Both are bad"
goes to a file beside it (.bad.jsonl), as two answers with the label false. The page shows the command that
trains on the picks.
"""

import dataclasses
import json
import random
import secrets
import shlex
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch

from dataset.turns import Message, checked_turns, messages
from errors import InputError, require, run_script
from eval import chat
from eval.common import load_model_and_tokenizer, print_note, print_start
from eval.page import digest
from eval.picks import SIDES, Comparison, Picks, pairs_to_rank
from eval.words import LANGUAGES, current, language, table, tr
from training.distributed import pick_device
from training.settings import flag, parse

HOST = "127.0.0.1"
LONGEST_REQUEST = 2**20  # bytes
COMPARISONS = 1000  # The server keeps the newest ones.


@dataclass
class Settings(chat.Settings):
    model: str = flag("runs/sft", "model folder that answers, and that the picks train")
    versus: str = flag("", "second model folder; empty: both answers are samples of --model")
    answers: str = flag("", "file of eval.sample; a second page ranks its answers")
    out: str = flag("runs/picks.jsonl", "file that the picks are appended to")
    port: int = flag(8000, f"port on {HOST}; 0: any free port")
    lang: str = flag("auto", "language of the page; auto: the language of the browser", LANGUAGES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.versus or self.temperature > 0, "temperature", "above 0 without --versus")
        self.require(self.port == 0 or 1024 <= self.port < 65536, "port", "0, or from 1024 to 65535")
        self.require(self.out.endswith(".jsonl"), "out", "a .jsonl file")


# ---- What all requests share


class Playground:
    """What all requests share: the models, the newest comparisons, the pairs to rank, the picks."""

    def __init__(self, settings: Settings):
        self.settings, self.picks = settings, Picks(settings.out)
        self.to_rank = deque(pairs_to_rank(settings.answers) if settings.answers else ())
        self.comparisons: OrderedDict[str, Comparison] = OrderedDict()
        self.lock, self.machine = threading.Lock(), threading.Lock()
        self.random = random.SystemRandom()  # Not --seed: the order must not repeat.
        # Started again with more picks, the same message gets other answers.
        self.generator = torch.Generator().manual_seed(settings.seed + len(self.picks.records))
        device, models, self.conversations = pick_device(settings.device), {}, []
        for folder in (settings.model, settings.versus or settings.model):
            if folder not in models:
                models[folder], tokenizer = load_model_and_tokenizer(folder, device)
                longest = chat.longest_prompt(settings, folder, models[folder])
            self.conversations.append((folder, chat.Conversation(models[folder], tokenizer, longest)))
        print_start(models, device, "fp32")

    def state(self) -> dict:
        """The words of the page, the number of picks, and the command that trains on them."""
        with self.lock:
            summary = self.picks.summary()
        command = train_command(self.settings.model, self.settings.out, summary["picks"])
        words = {"words": table(), "language": "zh-CN" if current() == "zh" else "en"}
        return {**summary, **words, "command": command, "ranking": bool(self.to_rank)}

    def ask(self, posted) -> dict:
        """Start a comparison of answers to the posted messages; the oldest are left out until they fit."""
        system = [Message("system", self.settings.system)] if self.settings.system else []
        turns = checked_turns(system + messages(posted, "messages"), "messages", last="user")
        *history, last = turns
        models = [dataclasses.replace(one, history=history) for _, one in self.conversations]
        prompt = min((one.with_message(last.content) for one in models), key=len)  # the same for both
        with self.lock:
            uniforms = torch.rand(2, self.settings.max_new_tokens, generator=self.generator)
            order = self.random.sample((0, 1), 2)
        sampling = {name: getattr(self.settings, name) for name in ("temperature", "top_p", "top_k")}
        names, replies = [], []
        for side, place in enumerate(order):
            name, conversation = self.conversations[place]
            conversation = dataclasses.replace(conversation, history=list(prompt))
            names.append(name)
            replies.append(conversation.reply(uniforms[[side]], **sampling))
        comparison = self.keep(Comparison(secrets.token_hex(16), prompt, names))
        work = replies, self.settings.max_new_tokens, self.machine
        threading.Thread(target=comparison.generate, args=work, daemon=True).start()
        return {"id": comparison.id, "messages": [asdict(turn) for turn in prompt[len(system) :]]}

    def next_pair(self) -> dict:
        """The next pair of --answers without a pick; the ``id`` is "" if every pair has one."""
        with self.lock:
            for _ in range(len(self.to_rank)):
                self.to_rank.rotate(-1)  # A pair that is shown now comes again after all others.
                pair = self.to_rank[-1]
                if pair.id not in self.picks.records:
                    break
            else:
                return {"id": "", "messages": []}
            order = self.random.sample((0, 1), 2)
        parts = {name: [getattr(pair, name)[side] for side in order] for name in ("models", "texts", "cut")}
        comparison = self.keep(Comparison(pair.id, pair.prompt, done=True, **parts))
        return {"id": comparison.id, "messages": [asdict(turn) for turn in comparison.prompt]}

    def keep(self, comparison: Comparison) -> Comparison:
        with self.lock:
            # A pair that two tabs show keeps the order of the first one.
            comparison = self.comparisons.setdefault(comparison.id, comparison)
            while len(self.comparisons) > COMPARISONS:
                self.comparisons.popitem(last=False)
        return comparison

    def pick(self, id: str, choice: str) -> dict:
        """Save a pick. A second request for a comparison changes nothing and gets the reply to the first."""
        with self.lock:
            comparison, record, note = self.comparisons.get(id), self.picks.records.get(id), ""
            if record is None:
                require(comparison, tr("The server was restarted: ask for two other answers."))
                record, note = comparison.record_of(choice)
                if record and not note:
                    self.picks.add(record)
        names = dict(zip(SIDES, comparison.models, strict=True)) if comparison else {}
        shown = names if len({*names.values()}) == 2 else None
        return {"chosen": record.get("chosen"), "note": note, "models": shown, "state": self.state()}


def train_command(model: str, data: str, picks: int) -> str:
    """The command that trains the model on the picks, into a folder that does not exist yet.

    Few pairs are read several times: one pass over 20 pairs in batches of 32 would be a single step.
    """
    base, number = f"{model.rstrip('/')}-picks", 1
    while Path(out := base if number == 1 else f"{base}-{number}").exists():
        number += 1
    epochs = min(20, max(1, 300 // max(picks, 1)))
    flags = {"model": model, "data": data, "out": out, "batch-size": 8, "epochs": epochs}
    return "python train_dpo.py " + " ".join(f"--{name} {shlex.quote(str(flags[name]))}" for name in flags)


# ---- The server


def page() -> tuple[bytes, str]:
    """The page and its policy (CSP): only its own script and styles run, and only this server is called."""
    folder = Path(__file__).parent
    html, shared = ((folder / name).read_text("utf-8") for name in ("playground.html", "page.css"))
    html = html.replace("<style>", f"<style>{shared}", 1)
    style, script = (html.split(f"<{tag}>")[1].split(f"</{tag}>")[0] for tag in ("style", "script"))
    own = f"style-src {digest(style)}; script-src {digest(script)}; connect-src 'self'; img-src data:"
    none = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return html.encode(), f"{none}; {own}"


class Handler(BaseHTTPRequestHandler):
    """One request. Other hosts (DNS rebinding) and other origins are refused before anything is read."""

    timeout = 60  # seconds for a client to send its request

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        with language(self.language()):
            if self.is_foreign():
                self.reply(403, {"error": "this server accepts requests of its own page only"})
            elif url.path in ("/", "/rank"):
                self.reply(200, self.server.html, "text/html")
            elif url.path == "/state":
                self.reply(200, self.server.play.state())
            elif url.path == "/stream":
                self.stream(parse_qs(url.query).get("id", [""])[0])
            else:
                self.reply(404, {"error": "not found"})

    def do_POST(self) -> None:
        with language(self.language()):
            play = self.server.play
            actions = {
                "/ask": lambda body: play.ask(body["messages"]),
                "/next": lambda body: play.next_pair(),
                "/pick": lambda body: play.pick(body["id"], body["choice"]),
            }
            length = self.headers.get("Content-Length", "")
            is_json = self.headers.get("Content-Type") == "application/json"
            if self.is_foreign() or not is_json:
                self.reply(403, {"error": "this server accepts requests of its own page only"})
            elif not length.isdecimal() or int(length) > LONGEST_REQUEST:
                self.reply(413, {"error": f"a request has at most {LONGEST_REQUEST} bytes"})
            elif self.path not in actions:
                self.reply(404, {"error": "not found"})
            else:
                try:
                    self.reply(200, actions[self.path](json.loads(self.rfile.read(int(length)))))
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    self.reply(400, {"error": str(error)})

    def is_foreign(self) -> bool:
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        port = self.server.server_port
        ours = origin == f"http://{host}" or (origin is None and self.command == "GET")
        return host not in (f"{HOST}:{port}", f"localhost:{port}") or not ours

    def language(self) -> str:
        """--lang, or the first language of the browser."""
        asked = self.server.play.settings.lang
        first = self.headers.get("Accept-Language", "").lower()
        return asked if asked != "auto" else "zh" if first.startswith("zh") else "en"

    def stream(self, id: str) -> None:
        """Server-sent events: a view of the comparison at each step until it is complete."""
        comparison = self.server.play.comparisons.get(id)
        with suppress(OSError):  # The tab was closed or reloaded.
            self.start(200, "text/event-stream")
            for view in comparison.views() if comparison else [{"gone": True}]:
                self.wfile.write(f"data: {json.dumps(view)}\n\n".encode())

    def reply(self, status: int, content: dict | bytes, kind: str = "application/json") -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with suppress(OSError):
            self.start(status, kind)
            self.wfile.write(data)

    def start(self, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store"),
            ("Content-Security-Policy", self.server.policy), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("Cross-Origin-Resource-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        """The terminal is for the models."""


def make_server(settings: Settings) -> ThreadingHTTPServer:
    """A server, ready for `serve_forever`, with its models loaded. Raises `InputError` for a used port."""
    play = Playground(settings)
    try:
        server = ThreadingHTTPServer((HOST, settings.port), Handler)
    except OSError as error:
        reason = f"--port {settings.port} cannot be used ({error.strerror}); give another one, or 0"
        raise InputError(reason) from None
    server.play, (server.html, server.policy) = play, page()
    return server


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    server = make_server(settings)
    print_note(f"picks go to {settings.out}; open http://{HOST}:{server.server_port}/ (Ctrl-C ends)")
    with suppress(KeyboardInterrupt), server:
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)

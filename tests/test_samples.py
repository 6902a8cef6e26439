"""Answers to held-out prompts during a run: whose they are, to which prompts, and what a resume keeps."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_dpo
from dataset.store import open_store
from dataset.turns import Message
from model.weights import load_model
from tests.conftest import RAGGED, make_model, plain_ids, plain_logits, save_folder, turns
from tests.ranks import forked
from tests.runs import ALONE
from training import samples
from training.metrics import RowFile


@pytest.fixture
def start(tmp_path, tokenizer):
    return save_folder(tmp_path / "start", tokenizer, hidden_size=32)


@pytest.fixture
def flags(start, ragged):
    """The flags of a run of four steps on the ragged pairs, evaluated on them at steps 0, 2 and 4."""
    flags = f"--model {start} --data {ragged} --eval-data {ragged} --batch-size 2 --eval-every 2 --device cpu"
    return [*flags.split(), "--precision", "fp32", "--log-every", "1", "--warmup-steps", "0"]


def rows(folder) -> list[dict]:
    lines = (folder / "samples.jsonl").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def plain_answer(model, tokenizer, prompt: list[int], limit: int) -> dict:
    """The likeliest token, one by one, until the end token or the limit."""
    tokens = []
    while len(tokens) < limit:
        token = int(plain_logits(model, prompt + tokens)[-1].argmax())
        if token == tokenizer.end_id:
            break
        tokens.append(token)
    finished = len(tokens) < limit
    return {"answer": tokenizer.decode(tokens), "finished": finished, "tokens": len(tokens)}


def test_a_sample_is_the_greedy_answer_of_the_policy_at_that_step(
    flags, start, tokenizer, tmp_path, monkeypatch
):
    """The answers of the reference, or of another step, would never change or change too early."""
    monkeypatch.setattr(samples, "ANSWER_TOKENS", 9)
    train_dpo.main([*flags, "--lr", "0.01", "--sample-prompts", "7", "--out", str(tmp_path / "run")])
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0] * 7 + [2] * 7 + [4] * 7
    for step, folder in ((0, start), (4, tmp_path / "run")):
        model = load_model(folder).double()
        of_step = [row for row in found if row["step"] == step]
        for row, (messages, *_) in zip(of_step, RAGGED, strict=True):
            prompt, _ = plain_ids(tokenizer, messages, "")
            assert {**row, **plain_answer(model, tokenizer, prompt, 9)} == row
    assert found[:7] != [{**row, "step": 0} for row in found[-7:]]


def test_the_prompt_is_the_users_text(flags, tmp_path):
    """A single turn is its text; a longer prompt shows the template between its messages."""
    train_dpo.main([*flags, "--sample-prompts", "7", "--max-steps", "1", "--out", str(tmp_path / "run")])
    prompts = [row["prompt"] for row in rows(tmp_path / "run")[:7]]
    assert prompts[:3] == ["How many apples are left?", "Hi", "苹果还剩几个？"]
    system = "<|im_start|>system\nPlease answer in one sentence.<|im_end|>\n<|im_start|>user\n😀 👍🏽"
    assert prompts[3] == system and prompts[4].startswith("Hello<|im_end|>\n<|im_start|>assistant\nHello,")


def test_prompts_are_different_and_spread_over_the_data(tokenizer, write_jsonl, capsys):
    """The first rows of a sorted file are about one thing, and a repeated prompt shows nothing new."""
    sides = {"chosen": "yes", "rejected": "no"}
    texts = ["Hi", "Hi", "Hi", *(f"{place}?" for place in range(9)), "long " * 200]
    store = open_store(
        write_jsonl("pairs.jsonl", [{"prompt": text, **sides} for text in texts]),
        "preferences", tokenizer, 4096,
    )  # fmt: skip
    settings = SimpleNamespace(sample_prompts=4, shard=False)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096, sliding_window=None))

    def chosen(**changes) -> list[list[int]]:
        vars(settings).update(changes)
        return samples.held_out_prompts(settings, {"": store}, model, ALONE)

    def ids(*texts: str) -> list[list[int]]:
        return [tokenizer.prompt([Message("user", text)]) for text in texts]

    assert chosen() == ids("Hi", "2?", "5?", "8?")
    assert chosen(sample_prompts=99) == ids("Hi", *(f"{place}?" for place in range(9)))
    assert chosen(sample_prompts=0) == [] and not capsys.readouterr().out
    model.config.max_position_embeddings = 130
    assert chosen(sample_prompts=4) == []
    assert "no samples: every held-out prompt has more than 2 tokens" in capsys.readouterr().out


def test_a_run_without_samples_leaves_none_of_an_earlier_one(flags, tmp_path):
    """They would be taken for its own."""
    once = [*flags, "--max-steps", "1", "--out", str(tmp_path / "run"), "--overwrite"]
    train_dpo.main(once)
    assert len(rows(tmp_path / "run")) == 8
    train_dpo.main([*once, "--sample-prompts", "0"])
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_an_answer_with_a_line_separator_is_one_row(tmp_path):
    """splitlines() cuts a row at U+2028 or U+0085, and a resumed run would lose it."""
    written = [{"step": 1, "answer": "a\u2028b\x85c\n"}, {"step": 2, "answer": "later"}]
    file = RowFile(tmp_path / "samples.jsonl", 0)
    file.append(written)
    file.close()
    again = RowFile(tmp_path / "samples.jsonl", 1)
    again.append([{"step": 3}])
    again.close()
    assert again.kept == written[:1] and rows(tmp_path) == [written[0], {"step": 3}]


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks(shard, flags, tmp_path):
    """One rank writes what one process writes; with split weights the run goes on without samples."""
    flags = [*flags, "--lr", "0"]
    train_dpo.main([*flags, "--out", str(tmp_path / "one")])
    more = ["--shard"] if shard else []
    result = forked("train_dpo", *flags, *more, "--out", tmp_path / "two", ranks=2)
    assert result.returncode == 0, result.stderr
    if shard:
        assert result.stdout.count("no samples: with --shard") == 1
        assert not (tmp_path / "two" / "samples.jsonl").exists()
    else:
        assert rows(tmp_path / "two") == rows(tmp_path / "one")


def test_the_compiler_leaves_generation_alone(tokenizer, monkeypatch):
    """A layer compiled for streams would be compiled again for caches, 35 seconds for four answers."""
    calls = []
    original = torch.nn.Module.compile

    def counting(module, **how):
        def backend(graph, inputs):
            calls.append(graph)
            return graph

        original(module, backend=backend, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", counting)
    model = make_model(tokenizer.vocab_size, torch.float32)
    prompts = [tokenizer.prompt(turns("Hi"))]
    plain = samples.greedy_answers(model, tokenizer, prompts, ALONE, compiled=False)
    train_dpo.compile_layers(model)
    assert samples.greedy_answers(model, tokenizer, prompts, ALONE, compiled=True) == plain
    assert not calls

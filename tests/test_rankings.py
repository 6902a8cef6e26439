"""K ranked replies: read, stored, computed on one stream, and trained on with Plackett-Luce."""

import itertools
import math

import numpy as np
import pytest
import torch

import train_dpo
from dataset.packing import build_stream, stream_lengths
from dataset.records import DataError, read_preferences, read_rankings
from dataset.store import open_store
from errors import InputError
from eval import preference
from losses import plackett_luce, ranking_accuracy, sigmoid
from tests.conftest import RAGGED, as_record, make_model, plain_ids, plain_logits, shared
from tests.loops import metrics, record_gradients
from tests.ranks import forked
from tests.runs import ALONE, FP32, assert_close, run_flags, same_model
from training.evaluate import evaluate
from training.objective import Objective, ObjectiveSettings, Pairs
from training.settings import parse

REPLIES = [
    ["Two apples are left.", "7", "How many?"],
    ["!", "Thank you, the answer is short. Hello again, hello."],
    ["还剩两个苹果。", "不知道", "苹果", "7", "!"],
    ["Thank you! 😀", "👍🏽 👍🏽 👍🏽", "No", "Yes"],
    ["  今天天气很好\n", "\nNo.\n\n"],
    ["6", "The answer is 123 456", "7 7 7"],
    ["The same beginning, then one", "The same beginning, then two, and more", "The same"],
]
ROWS = [
    {"prompt": as_record(pair)["prompt"], "ranked": replies}
    for pair, replies in zip(RAGGED, REPLIES, strict=True)
]
MOST = 5


@pytest.fixture
def stored(write_jsonl, tokenizer):
    return open_store(write_jsonl("ranked.jsonl", ROWS), "rankings", tokenizer, 512)


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- The loss


def log_likelihood(rewards: list[float]) -> float:
    """log P(this order): the best is drawn among all, the second among the rest, and so on."""
    weights = [math.exp(r) for r in rewards]
    return sum(math.log(w / sum(weights[k:])) for k, w in enumerate(weights))


def test_the_loss_is_the_likelihood_of_the_order():
    """Value and slopes by hand, for rows of 2 to 5 replies in one batch; the missing ones get no gradient."""
    lists = [[0.4, -1.3], [5.0, -0.2, 2.1], [-7.5, 0.8, 3.0, 0.1], [0.0, 0.0, 1.0, -2.0, 4.0]]
    padded = [[*r[:-1], *[math.nan] * (MOST - len(r)), r[-1]] for r in lists]
    logratios, beta = float64(padded).requires_grad_(), 0.3
    losses = plackett_luce(logratios, beta)
    expected = [-log_likelihood([beta * x for x in row]) for row in lists]
    torch.testing.assert_close(losses.detach(), float64(expected), rtol=1e-12, atol=1e-12)
    (slopes,) = torch.autograd.grad(losses.sum(), logratios)
    for row, found in zip(lists, slopes, strict=True):
        weights = [math.exp(beta * x) for x in row]
        # The slope in r_i: minus 1 if i is drawn before the last, plus its share in each draw that it is in.
        by_hand = [
            beta * (sum(w / sum(weights[k:]) for k in range(min(i + 1, len(row) - 1))) - (i < len(row) - 1))
            for i, w in enumerate(weights)
        ]
        assert [*found[: len(row) - 1].tolist(), found[-1].item()] == pytest.approx(by_hand)
        assert not found[len(row) - 1 : -1].any()
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, beta), float64(lists[3:]).requires_grad_())


def test_laws_of_the_loss():
    """The orders' probabilities sum to 1; a constant changes nothing; ln K! where policy is reference."""
    rewards = float64([0.3, -1.0, 2.0, 0.5])
    orders = torch.stack([rewards[list(order)] for order in itertools.permutations(range(4))])
    assert (-plackett_luce(orders, 1.0)).exp().sum().item() == pytest.approx(1)
    torch.testing.assert_close(plackett_luce(orders + 7, 0.3), plackett_luce(orders, 0.3))
    for k in (2, 3, 7):
        assert plackett_luce(torch.zeros(1, k), 0.1).item() == pytest.approx(math.log(math.factorial(k)))
    best = plackett_luce(orders, 1.0).argmin()
    assert orders[best].tolist() == rewards.sort(descending=True).values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_replies_are_dpo_to_the_bit(dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(500, dtype=dtype).mul(40).requires_grad_() for _ in range(2))
    for beta in (0.1, 0.37, 1.0):
        ranked, dpo = plackett_luce(torch.stack([a, b], dim=1), beta), sigmoid(a - b, beta)
        assert torch.equal(ranked, dpo)
        both = (torch.autograd.grad(losses.sum(), (a, b)) for losses in (ranked, dpo))
        assert all(itertools.starmap(torch.equal, zip(*both, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(dtype):
    rows = [*itertools.product([-1e4, 0.0, 1e4, math.nan], repeat=3)]
    ends = itertools.product([-1e4, 1e4], repeat=2)
    rows = [[x, *rest, y] for x, y in ends for rest in rows]
    logratios = torch.tensor(rows, dtype=dtype).requires_grad_()
    losses = plackett_luce(logratios, 1.0)
    (slopes,) = torch.autograd.grad(losses.sum(), logratios)
    assert losses.isfinite().all() and slopes.isfinite().all()
    worst = plackett_luce(torch.tensor([[-1e4, 0.0, 1e4]], dtype=dtype), 1.0)
    assert worst.item() == pytest.approx(3e4)


def test_the_accuracy_is_a_share_of_pairs():
    """3 pairs of 3 replies, a tie is a half; a missing reply is in no pair."""
    nan = math.nan
    rows = [[3.0, 2, nan, 1], [1.0, 2, nan, 3], [2.0, 2, nan, 1], [2.0, nan, nan, 1], [4.0, 3, 1, 2]]
    assert ranking_accuracy(float64(rows)).tolist() == pytest.approx([1, 0, 2.5 / 3, 1, 5 / 6])


# ---- From records to a stream


@pytest.mark.parametrize("kind, rows", [("rankings", 1), ("feedback", 2)])
def test_a_tie_has_no_order_and_no_label(kind, rows, write_jsonl, tokenizer):
    judged = [{"prompt": "a", "response_a": "b", "response_b": "c", "winner": x} for x in ("model_b", "tie")]
    store = open_store(write_jsonl("judged.jsonl", judged), kind, tokenizer, 512)
    assert len(store) == rows and store.report.dropped == {"the verdict is a tie": [2] * rows}
    assert tokenizer.decode(store.row(0)[1][0].tolist()).startswith("c")



def test_a_ranking_keeps_all_replies_and_a_pair_the_ends(write_jsonl):
    path = write_jsonl("ranked.jsonl", ROWS)
    for record, pair, replies in zip(read_rankings(path), read_preferences(path), REPLIES, strict=True):
        assert record.replies == tuple(replies) and record.prompt == pair.prompt
        assert (pair.chosen, pair.rejected) == (replies[0], replies[-1])


def test_a_pair_is_a_ranking_of_two(ragged, tokenizer):
    pairs, rankings = (open_store(ragged, kind, tokenizer, 512) for kind in ("preferences", "rankings"))
    assert np.array_equal(pairs.bounds, rankings.bounds) and np.array_equal(pairs.tokens, rankings.tokens)


def test_bad_rankings(write_jsonl, tokenizer):
    path = write_jsonl("bad.jsonl", [{"prompt": "a", "ranked": ["b", " ", "c"]}])
    with pytest.raises(DataError, match=r"reply 1: turn 1 \(assistant\) is empty"):
        open_store(path, "rankings", tokenizer, 512)
    rows = [*ROWS, *({"prompt": "a", "ranked": ["b", x, "d"]} for x in ("d", "c" * 600))]
    store = open_store(write_jsonl("equal.jsonl", rows), "rankings", tokenizer, 512)
    assert store.report.dropped == {"two replies are equal": [8], "too long": [9]}
    path = write_jsonl("short.jsonl", [{"prompt": "a", "ranked": ["b"]}])
    with pytest.raises(DataError, match="ranked: expected a list of two replies or more"):
        open_store(path, "rankings", tokenizer, 512)


def test_a_row_with_fewer_replies_is_padded_before_its_last(stored, tokenizer):
    for (prompt, *_), replies, row in zip(RAGGED, REPLIES, range(7), strict=True):
        found = [ids.tolist() for ids, _ in stored.row(row)]
        ids = [plain_ids(tokenizer, prompt, reply) for reply in replies]
        answers = [answer for _, answer in ids]
        assert found == [ids[0][0], *answers[:-1], *[[]] * (MOST - len(replies)), answers[-1]]


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_log_ratios_of_a_stream_are_those_of_single_sequences(layout, stored, tokenizer):
    """One prompt, K branches: each as if it were alone; and the lengths by which micro-batches are filled."""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    rows = [2, 0, 4, 1, 3, 6, 5]
    stream = build_stream(stored, rows, layout)
    assert len(stream.tokens) == stream_lengths(stored, layout)[rows].sum()
    pairs = Pairs.of(stream, model(stream), reference(stream))
    for row, found in zip(rows, pairs.reply_logratios, strict=True):
        expected = []
        for reply in REPLIES[row]:
            x, y = plain_ids(tokenizer, RAGGED[row][0], reply)
            where = torch.arange(len(y)), torch.tensor(y)
            logits = (plain_logits(m, x + y)[len(x) - 1 : -1] for m in (model, reference))
            p, q = (each.log_softmax(-1)[where] for each in logits)
            expected.append((p - q).sum().item())
        assert found[~found.isnan()].tolist() == pytest.approx(expected, rel=1e-9)
    ends = torch.stack([pairs.chosen_logratios, pairs.rejected_logratios], dim=1)
    assert torch.equal(ends, pairs.reply_logratios[:, [0, -1]])


# ---- Training


@pytest.fixture
def run_dpo(tmp_path, tokenizer):
    made = run_flags(
        tmp_path, tokenizer, ROWS, shape={"spread": 0.1}, epochs=2, log_every=1, eval_every=1, overwrite=True,
        loss="plackett_luce", sample_prompts=0,
    )  # fmt: skip

    def run(out="out", command=train_dpo.main, eval_data=True, **flags):
        command(made(tmp_path / out, eval_data=eval_data, **flags))
        return tmp_path / out

    return run


def test_a_run_on_pairs_is_dpo_to_the_bit(run_dpo, ragged):
    one, other = (run_dpo(loss, data=ragged, loss=loss) for loss in ("sigmoid", "plackett_luce"))
    assert same_model(one, other)
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert {name: theirs[name] for name in mine if "second" not in name} == {
            name: value for name, value in mine.items() if "second" not in name
        }


def test_a_run_starts_at_the_log_of_k_factorial(run_dpo, tokenizer):
    """The loss, and what is logged of the best and the worst reply and of all pairs of replies."""
    folder = run_dpo(batch_size=7, lr=3e-2, epochs=8)
    rows = metrics(folder)
    start = sum(math.log(math.factorial(len(replies))) for replies in REPLIES) / 7
    assert rows[0]["eval_loss"] == pytest.approx(start, rel=1e-6)
    assert rows[1]["loss"] == pytest.approx(start, rel=1e-6) and rows[1]["rewards/order"] == 0.5
    last = rows[-1]
    assert last["eval_loss"] < 0.8 * start and last["eval_rewards/order"] > 0.7
    flags = ["--model", str(folder), "--device", "cpu", "--precision", "fp32"]
    measured = preference.measure(parse(preference.Settings, "", flags), ALONE)
    assert measured["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert measured["rewards/order"] == pytest.approx(last["eval_rewards/order"])


LAYOUTS = {
    "twin": {"layout": "twin"},
    "split": {"micro_batch_tokens": 130},
    "cached": {"reference": "cached"},
    "lora": {"lora_rank": 4, "reference": "cached"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_do_not_depend_on_how_they_are_computed(name, run_dpo):
    plain = {"lora_rank": 4} if name == "lora" else {}
    whole = record_gradients(train_dpo, lambda: run_dpo("whole", eval_data="", **plain))
    other = record_gradients(train_dpo, lambda: run_dpo("other", eval_data="", **LAYOUTS[name]))
    assert len(whole) == len(other) == 4
    assert_close(other, whole, 1e-4)


def test_two_ranks_equal_one_process(run_dpo, tmp_path):
    """Split weights too: a rank's last micro-batch may be empty."""
    flags = {"eval_data": "", "micro_batch_tokens": 1}
    alone = record_gradients(train_dpo, lambda: run_dpo("one", **flags))

    def on_two_ranks(arguments):
        result = forked("tests.loops", "train_dpo", tmp_path / "two.pt", *arguments, ranks=2)
        assert result.returncode == 0, result.stderr

    run_dpo("two", on_two_ranks, **flags)
    assert_close(torch.load(tmp_path / "two.pt", weights_only=True), alone, 2e-4)


def test_evaluation_does_not_depend_on_its_batches(stored, tokenizer):
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    made = Objective(ObjectiveSettings(loss="plackett_luce,sft", loss_weights="1,0.2"))
    whole, *others = (
        evaluate(model, reference, stored, ALONE, FP32, made, max_tokens=size) for size in (2000, 1, 130)
    )
    for other in others:
        assert other == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("options, reason", [
    (dict(wpo=True), "--wpo changes pairs, but --loss plackett_luce trains on rankings"),
    (dict(ld_alpha=0.5), "--ld-alpha changes pairs, but"),
    (dict(f_divergence="js"), "--f-divergence changes margins, which --loss plackett_luce does not use"),
    (dict(label_smoothing=0.1), "--label-smoothing has no effect on --loss plackett_luce"),
])  # fmt: skip
def test_options_of_pairs_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Objective(ObjectiveSettings(loss="plackett_luce", **options))
    settings = train_dpo.Settings(loss="plackett_luce", swap_by_score=True)
    with pytest.raises(InputError, match="--swap-by-score changes pairs, but"):
        Objective(settings)


# ---- Real data


def test_real_rankings_read_whole(real_tokenizer):
    """OASST's Chinese prompts with 2 to 10 replies: each record is kept or counted, with all replies."""
    path = shared("preferences/oasst_rm_zh.json.gz")
    records = {record.line: record for record in read_rankings(path)}
    store = open_store(path, "rankings", real_tokenizer, 1024)
    assert len(records) == 775 and store.bounds.shape[1] == 12
    assert {len(record.replies) for record in records.values()} == {2, 3, 4, 5, 6, 8, 10}
    dropped = {reason: len(lines) for reason, lines in store.report.dropped.items()}
    assert store.report.total() == 775 and dropped["two replies are equal"] == 3
    for row in range(0, len(store), 50):
        replies = records[store.lines[row]].replies
        answers = [real_tokenizer.decode(ids[:-1].tolist()) for ids, _ in store.row(row)[1:] if len(ids)]
        assert answers == [*replies]
    stream = build_stream(store, range(3))
    assert stream.sum_by_response(torch.ones(len(stream.targets))).shape == (30,)

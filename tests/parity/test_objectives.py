"""Every objective against TRL's own: value and gradient, where we agree and where we do not.

They agree when the loss, and its gradient by all weights as one vector, are within 1e-6 of TRL's, in float32.
Where we differ on purpose, a test says how in one sentence, gives the number of either side, and closes the
gap from one of them: so there is no second difference behind the first.
"""

import copy
import importlib.util
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerState
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from dataset.packing import build_stream
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from losses import LOSSES
from tests.conftest import ROOT, make_model
from tests.parity.objectives import (
    BETA,
    END,
    PAIRS,
    Rows,
    Said,
    V,
    arguments,
    as_text,
    assert_agree,
    assert_apart,
    dataset_of,
    make_trainer,
    mean,
    number_reader,
    one_by_one,
    our,
    policy,
    random_pairs,
    reference,
    said,
    their,
    their_experiment,
    their_model,
)
from training.distributed import World
from training.objective import Objective, ObjectiveSettings, Pairs
from training.precision import Precision

SAMPLE = ROOT / "dataset" / "sample"
SMOOTH = {"label_smoothing": 0.2}
ALPHA = {"f_divergence_type": "alpha_divergence"}
FORWARD = {"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}
JS = {"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}


# ---- Where we agree

# The loss and its options; TRL's options where they differ, and its loss where it has another name.
AGREE = {
    "sigmoid": ("sigmoid", {}),
    "hinge": ("hinge", {}),
    "robust": ("robust", SMOOTH),
    "ipo_norm": ("ipo_norm", {}, {}, "ipo"),
    "exo_pair": ("exo_pair", SMOOTH),
    "exo_pair by default": ("exo_pair", {}, {"label_smoothing": 1e-3}),
    "nca_pair": ("nca_pair", {}),
    "sppo_hard": ("sppo_hard", {}),  # The authors' code has half of it.
    "aot": ("aot", {}),
    "aot, smoothed": ("aot", SMOOTH),
    "aot_unpaired": ("aot_unpaired", {}),
    "aot_unpaired, smoothed": ("aot_unpaired", SMOOTH),
    "apo_zero": ("apo_zero", {}),  # Of this and the next the paper has 1 less.
    "apo_down": ("apo_down", {}),
    "discopop, warm": ("discopop", {"discopop_tau": 0.5}),
    "sigmoid_norm": ("sigmoid_norm", {}),
    "bco_pair, first step": ("bco_pair", {}),
    "forward_kl": ("sigmoid", *FORWARD),
    "forward_kl, hinge": ("hinge", *FORWARD),
    "js": ("sigmoid", *JS),
    "js, robust": ("robust", *(SMOOTH | names for names in JS)),
    "alpha 0.5": ("sigmoid", {"f_divergence": "alpha"}, ALPHA),
    "ld": ("sigmoid", {"ld_alpha": 0.3}),
    "ld 0, sppo_hard": ("sppo_hard", {"ld_alpha": 0.0}),
    "ld, js": ("sigmoid", *({"ld_alpha": 0.3} | names for names in JS)),
}


@pytest.mark.parametrize("case", AGREE)
def test_value_and_gradient_agree(case):
    loss, options, their_options, their_loss = (*AGREE[case], None, None)[:4]
    theirs = their(their_loss or loss, **(options if their_options is None else their_options))
    assert_agree(our(loss, **options), theirs)


def test_the_pairs_tell_the_objectives_apart():
    """Of pairs that lie in the same order for policy and reference, for one, `aot` is `sigmoid`."""
    values = sorted(our(loss, **options).value for loss, options, *_ in AGREE.values())
    assert min(np.diff(values)) > 1e-5


def test_discopop_agrees():
    """Its temperature hands the gradient 1 / 0.05 times what float32 rounds off a log-prob.

    So the two are 1.2e-6 apart, and ours is as far from its own float64.
    """
    assert_agree(our("discopop"), their("discopop"), gradient=5e-6)


def test_weighted_losses_agree():
    ours = our("sigmoid,nca_pair,hinge", loss_weights="0.8,0.3,2")
    assert_agree(ours, their("sigmoid", "nca_pair", "hinge", loss_weights=[0.8, 0.3, 2.0]))


def test_offsets_are_a_shift_of_the_reference():
    """odpo, rdpo: TRL has neither. If all pairs have one gap, or one difference of lengths, a reference that
    finds the chosen answers likelier by offset / beta does the same."""
    offset = 0.5 * np.log(6.0)
    assert_agree(our("odpo", odpo_alpha=0.5, gap=6.0), their("sigmoid", shift=(offset / BETA, 0)))
    longer = random_pairs((5, 4, 2), (2, 3, 1), (7, 5, 3))
    theirs = their("sigmoid", pairs=longer, shift=(-2 * 0.3 / BETA, 0))
    assert_agree(our("rdpo", longer, rdpo_alpha=0.3), theirs)


def test_rebel_is_ipo_with_a_gap_of_its_target():
    """rebel: TRL has no regression on scores; its "ipo" is one of means, all on the gap 1 / (2 beta)."""
    alike, n = random_pairs((5, 3, 3), (2, 3, 3), (7, 3, 3)), 3
    assert_agree(our("rebel", alike, beta=1 / n, gap=1 / (2 * BETA)), their("ipo", pairs=alike))


# ---- Where we differ on purpose


def test_label_smoothing_smooths():
    """cDPO: `label_smoothing` does nothing to TRL's "sigmoid"; its "aot" of a single pair is our cDPO."""
    assert_apart(our("sigmoid", **SMOOTH), their("sigmoid", **SMOOTH), 0.680676, 0.671071)
    assert their("sigmoid", **SMOOTH).value == their("sigmoid").value
    assert_agree(our("sigmoid", **SMOOTH), one_by_one(their, "aot", **SMOOTH))


def test_ipo_takes_sums():
    """ipo: the paper's eq. 17 has sums, TRL's "ipo" means by token: our `ipo_norm`.

    Of answers of n tokens each, a mean with beta is 1 / n^2 of a sum with beta / n.
    """
    assert_apart(our("ipo"), their("ipo"), 21.75106, 23.30325)
    alike, n = random_pairs((5, 3, 3), (2, 3, 3), (7, 3, 3)), 3
    sums, means = our("ipo", alike, beta=BETA / n), their("ipo", pairs=alike)
    assert_agree(sums, Said(n**2 * means.value, n**2 * means.gradient))


def test_sft_is_a_mean_over_answers():
    """sft, and so RPO and MPO: TRL takes a mean over the batch's tokens, in which long answers weigh more."""
    assert_apart(our("sft"), their("sft"), 3.190461, 3.181213)
    assert_agree(our("sft"), one_by_one(their, "sft"))
    assert_agree(our("sigmoid,sft"), one_by_one(their, "sigmoid", "sft"))
    mpo = our("sigmoid,bco_pair,sft", loss_weights="0.8,0.2,1")
    assert_agree(mpo, one_by_one(their, "sigmoid", "bco_pair", "sft", loss_weights=[0.8, 0.2, 1.0]))


def test_bco_has_its_delta():
    """bco_pair: good and bad part at the mean reward delta, as in the paper; in TRL at 0.

    A reference that finds all answers likelier by delta / beta lowers all rewards by delta.
    """
    delta = 0.7
    assert_apart(our("bco_pair", delta=delta), their("bco_pair"), 1.467426, 1.364191)
    assert_agree(our("bco_pair", delta=delta), their("bco_pair", shift=(delta / BETA, delta / BETA)))


def test_alpha_is_the_papers():
    """alpha: f'(u) is the paper's (1 - u^-alpha) / alpha; what TRL calls alpha is 1 - alpha."""
    ours = our("sigmoid", f_divergence="alpha", divergence_alpha=0.2)
    assert_apart(ours, their("sigmoid", f_alpha_divergence_coef=0.2, **ALPHA), 0.675708, 0.684396)
    assert_agree(ours, their("sigmoid", f_alpha_divergence_coef=0.8, **ALPHA))


def test_wpo_weighs_at_most_1():
    """WPO: a pair weighs at most 1, as in the authors' code; in TRL a likely one weighs more."""
    unlikely = Rows(PAIRS[:5])  # Each of these weighs less than 1.
    for losses in (["sigmoid"], ["sigmoid", "nca_pair"]):
        theirs = their(*losses, pairs=unlikely, use_weighting=True)
        assert_agree(our(",".join(losses), unlikely, wpo=True), theirs)
    likely = Rows([likeliest_pair()])
    ours = our("sigmoid", likely, wpo=True)
    assert_apart(ours, their("sigmoid", pairs=likely, use_weighting=True), 0.697116, 1.023045)
    assert_agree(ours, their("sigmoid", pairs=likely))


def likeliest_pair() -> tuple[list[int], list[int], list[int]]:
    """A prompt of one token with the answers, of one token and of two, that the policy says most readily."""
    pairs = Rows(([x], [END], [y, END]) for x in range(2, V) for y in range(2, V))
    stream = build_stream(pairs, range(len(pairs)))
    with torch.no_grad():
        logps = policy()(stream)
        collisions = torch.cat([(2 * p).logsumexp(-1) for p in policy().log_distributions(stream)])
    chosen, rejected = stream.sum_by_side(logps - collisions)
    return pairs[(chosen + rejected / 2).argmax()]


@pytest.mark.parametrize("losses", [["hinge"], ["sigmoid", "sft"]])
def test_wpo_weighs_every_loss(losses):
    """WPO: TRL multiplies in place what the gradient of "hinge" and "sft" still needs, and stops."""
    with pytest.raises(RuntimeError, match=r"inplace operation|single memory location"):
        their(*losses, use_weighting=True)
    assert our(",".join(losses), wpo=True).gradient.norm() > 0


def test_kto_measures_a_side_from_the_other():
    """kto_pair: each side is measured from the mean log-ratio of the other; KTOTrainer, which knows no pairs,
    measures both from the answers of other rows, which it takes for unrelated."""

    def theirs(rows: Dataset, others: list[list[int]] | None = None) -> Said:
        trainer = make_trainer(KTOTrainer, rows, beta=1.0, per_device_train_batch_size=len(rows))
        examples = [*trainer.train_dataset]
        for example, ids in zip(examples, others or (), strict=bool(others)):
            example["KL_completion_ids"] = ids
        return said(trainer, trainer.data_collator(examples))

    def side(label: bool, answers: tuple, others: tuple) -> Said:
        columns = {"prompt": prompts, "completion": answers}
        rows = {name: [as_text(ids) for ids in column] for name, column in columns.items()}
        return theirs(Dataset.from_dict(rows | {"label": [label] * len(answers)}), others)

    prompts, chosen, rejected = zip(*PAIRS, strict=True)
    ours = our("kto_pair", beta=1.0)
    assert_apart(ours, theirs(dataset_of(PAIRS)), 0.395105, 0.450905)
    assert_agree(ours, mean([side(True, chosen, rejected), side(False, rejected, chosen)]))


def feedback(pairs: Rows, labels: list[bool]) -> TokenStore:
    """A store of the prompts and chosen answers, each labelled."""
    store = object.__new__(TokenStore)
    answers = [([], y) if not label else (y, []) for (_, y, _), label in zip(pairs, labels, strict=True)]
    runs = [[x, *sides] for (x, *_), sides in zip(pairs, answers, strict=True)]
    store.tokens = np.concatenate([np.array(ids, int) for row in runs for ids in row])
    store.supervised = np.ones(len(store.tokens), dtype=bool)
    ends = np.cumsum([len(ids) for row in runs for ids in row]).reshape(-1, 3)
    store.bounds = np.concatenate([np.append(0, ends[:-1, -1])[:, None], ends], axis=1)
    store.digests, store.fingerprint, store.score_margins = np.arange(len(pairs)), "", None
    store.target_counts = store.bounds[:, 3] - store.bounds[:, 1]
    store._derive()
    return store


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.5, "undesirable_weight": 0.7}])
@pytest.mark.parametrize("labels", [[True] * 8, [False] * 8, [True, False, False, True] * 2])
def test_kto_agrees(labels, weights):
    """kto: KTOTrainer's, where it takes the mismatched answers that we take, those of the next rows."""
    store = feedback(PAIRS, labels)
    made = Objective(ObjectiveSettings(loss="kto", beta=1.0, **weights))
    world, precision = World(0, 1, torch.device("cpu")), Precision("fp32", torch.device("cpu"))
    made.before_step(policy(), reference(), store, np.arange(8), world, precision, "forked", 10_000)
    stream = build_stream(store, range(8))
    batch = Pairs.of(stream, policy()(stream), reference()(stream).detach())
    value = made(batch).mean()
    gradients = torch.autograd.grad(value, list(policy().parameters()))
    ours = Said(value.item(), torch.cat([gradient.flatten() for gradient in gradients]))

    prompts, answers, _ = zip(*PAIRS, strict=True)
    rows = {"prompt": [as_text(ids) for ids in prompts], "completion": [as_text(ids) for ids in answers]}
    options = {"beta": 1.0, "per_device_train_batch_size": 8, **weights}
    trainer = make_trainer(KTOTrainer, Dataset.from_dict(rows | {"label": labels}), **options)
    examples = [*trainer.train_dataset]
    for place, example in enumerate(examples):
        example["KL_completion_ids"] = answers[(place + 1) % 8]
    assert made.z0 > 0.01
    assert_agree(ours, said(trainer, trainer.data_collator(examples)))


def test_exo_has_a_default_epsilon():
    """exo_pair: epsilon is 0.001 unless given, as the paper has it; TRL's default is 0, which it refuses."""
    with pytest.raises(ValueError, match="must be greater than 0"):
        their("exo_pair")
    assert our("exo_pair").value == our("exo_pair", label_smoothing=1e-3).value


def test_nothing_overflows():
    """Answers that the policy has given up: TRL's forward_kl and discopop are NaN there, its alpha lets them
    go without a gradient; ours are finite and pull."""
    for nats, ours, theirs in ((100, *FORWARD), (200, {"f_divergence": "alpha"}, ALPHA)):
        shift = {"shift": (nats, nats)}
        one, other = our("sigmoid", **shift, **ours), their("sigmoid", **shift, **theirs)
        assert np.isfinite(one.value) and 0 < one.gradient.norm() < np.inf
        if theirs == ALPHA:
            assert other.value == pytest.approx(np.log(2)) and not other.gradient.any()
        else:
            assert np.isnan(other.value) and other.gradient.isnan().any()

    lost = (100 / BETA, 0)
    ours, theirs = our("discopop", shift=lost), their("discopop", shift=lost)
    assert np.isnan(theirs.value) and theirs.gradient.isnan().any()
    assert ours.value == pytest.approx(100, rel=1e-2)
    assert_agree(ours, their("sigmoid", shift=lost))


# ---- Without a reference


def test_simpo_is_the_preference_alone():
    """simpo: the paper's loss; CPOTrainer's adds a likelihood, which its `cpo_alpha` must be told not to."""
    ours = our("simpo", simpo_gamma=0.3)
    simpo = {"loss_type": "simpo", "simpo_gamma": 0.3}
    assert_apart(ours, their_experiment(CPOTrainer, **simpo), 0.851205, 4.032418)
    assert_agree(ours, their_experiment(CPOTrainer, cpo_alpha=0.0, **simpo))


def test_orpo_learns_no_prompts():
    """orpo: its likelihood is the answer's, a mean for each; ORPOTrainer's is that of all tokens of a batch,
    the prompts' as well. Prompts of one token have none that is predicted."""
    assert_apart(our("orpo"), their_experiment(ORPOTrainer), 3.257766, 3.339171)
    short = Rows((prompt[:1], *answers) for prompt, *answers in PAIRS)
    assert_agree(our("orpo", short), one_by_one(their_experiment, ORPOTrainer, pairs=short))


# ---- What the one has and the other has not


def test_names():
    """DPOTrainer names the losses that it knows; "aot_pair", as aot_unpaired was called, is gone."""
    with pytest.raises(ValueError, match="Unknown loss type: aot_pair") as error:
        their("aot_pair")
    known = {*re.findall(r"'(\w+)'", str(error.value))}
    assert known <= LOSSES.keys() and len(known) == 15
    others = {"soft", "dpop", "ipo_norm", "kto_pair", "kto", "simpo", "orpo", "plackett_luce"}
    assert LOSSES.keys() - known == others | {"rebel", "odpo", "rdpo", "tdpo2", "simper"}
    assert not importlib.util.find_spec("trl.experimental.bco")  # BCO's own trainer, which had its delta.


REFUSED = {
    "would both correct for length": ("ipo_norm", {"ld_alpha": 0.5}, {"ld_alpha": 0.5}, "ipo"),
    "which --loss aot does not use": ("aot", {"ld_alpha": 0.5}, {"ld_alpha": 0.5}, "aot"),
    "which --loss sigmoid_norm does not use": ("sigmoid_norm", *JS, "sigmoid_norm"),
    "needs --label-smoothing": ("robust", {}, {}, "robust"),
    "has no effect on --loss hinge": ("hinge", SMOOTH, SMOOTH, "hinge"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_we_refuse_and_they_compute(reason):
    """Options that mean nothing to a loss, or say a thing twice, are errors here and a number there."""
    loss, options, their_options, their_loss = REFUSED[reason]
    with pytest.raises(InputError, match=reason):
        our(loss, **options)
    assert np.isfinite(their(their_loss, **their_options).value)


def test_a_soft_step_of_the_reference_is_theirs():
    """TR-DPO: theirs is soft and rare at once, by default every 512th step; the paper's is soft at every
    step, or a copy every so many. A step by itself is the same."""
    args = arguments(DPOTrainer, ref_model_mixup_alpha=0.3)
    assert args.ref_model_sync_steps == 512
    Accelerator(cpu=True)  # Their callback asks for one that is set up.
    ours, theirs = copy.deepcopy(reference()), copy.deepcopy(reference())
    Objective(ObjectiveSettings(tr_alpha=0.3)).after_step(511, policy(), ours, lambda sums: sums)
    sync = SyncRefModelCallback(theirs, accelerator=None)
    sync.on_step_end(args, TrainerState(global_step=511), None, model=policy())
    for mine, other, start in zip(*(m.parameters() for m in (ours, theirs, reference())), strict=True):
        assert torch.equal(other, start) and not torch.equal(mine, start)
    sync.on_step_end(args, TrainerState(global_step=512), None, model=policy())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


# ---- A whole file


def test_log_probs_of_a_whole_file_are_theirs():
    """log pi of both answers of every bundled held-out pair, as DPOTrainer adds them up for its reference."""
    tokenizer = ChatTokenizer(SAMPLE / "tokenizer.json")
    store = open_store(SAMPLE / "heldout.jsonl", "preferences", tokenizer, max_length=512)
    pairs = Rows(tuple(ids.tolist() for ids, _ in store.row(row)) for row in range(len(store)))
    model = make_model(tokenizer.vocab_size, torch.float32, tie_word_embeddings=False)
    reader = number_reader(tokenizer.vocab_size, end=pairs[0][1][-1])
    trainer = DPOTrainer(
        their_model(model), ref_model=their_model(model), args=arguments(DPOTrainer),
        train_dataset=dataset_of(pairs), processing_class=reader,
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(store) == 400
    for start in range(0, len(store), 20):
        rows = range(start, start + 20)
        inputs = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        theirs = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        stream = build_stream(store, rows)
        with torch.no_grad():
            ours = stream.sum_by_side(model(stream))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)

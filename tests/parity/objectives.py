"""One batch of pairs through our objective and through TRL's trainers: the same weights, the same tokens.

Nothing of TRL is typed again. Its trainers read the pairs as text, tokenise, pad, and run a Llama of
transformers' and their own `compute_loss`. Both sides give the loss and its gradient by all weights.
"""

import copy
import functools
import tempfile
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dataset.packing import build_stream
from model.transformer import Transformer
from tests.conftest import make_model
from training.objective import Objective, ObjectiveSettings

disable_progress_bars()
V, END, BETA = 24, 1, 0.1
CONFIGS = {DPOTrainer: DPOConfig, KTOTrainer: KTOConfig, CPOTrainer: CPOConfig, ORPOTrainer: ORPOConfig}
SHAPE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "rms_norm_eps", "tie_word_embeddings"),
)


class Said(NamedTuple):
    value: float
    gradient: Tensor  # by all weights, flat, in the order of our model


# ---- Pairs


class Rows(list):
    """Pairs of token ids, (prompt, chosen, rejected), where a `TokenStore` is expected."""

    reference_logps = score_margins = None  # nothing is cached, nothing is scored

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.array(ids), np.ones(len(ids), dtype=bool)) for ids in self[index]]


def random_pairs(*lengths: tuple[int, int, int]) -> Rows:
    """Random tokens; each answer ends with the end token, which TRL adds where it is missing."""
    draw = np.random.default_rng(0).integers
    pairs = ([draw(2, V, length).tolist() for length in shape] for shape in lengths)
    return Rows((prompt, [*chosen[:-1], END], [*rejected[:-1], END]) for prompt, chosen, rejected in pairs)


# Ragged, so that sums, means by token and means of means are three things. Short, and a single layer, because
# float32 rounds a log-prob of 20 nats by 1e-6 already, and some gradients multiply that.
LENGTHS = (5, 4, 1), (3, 1, 3), (8, 2, 2), (2, 2, 4), (6, 3, 2), (4, 2, 2), (7, 2, 2), (3, 2, 2)
PAIRS = random_pairs(*LENGTHS)


def as_text(ids: list[int]) -> str:
    return "".join(f" <{token}>" for token in ids)


def number_reader(vocabulary: int, end: int) -> PreTrainedTokenizerFast:
    """Reads " <7> <12>" as tokens 7 and 12: their trainers tokenise, and see our tokens all the same."""
    words = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(vocabulary)}, "<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{end}>", pad_token="<0>")


def dataset_of(pairs: Rows) -> Dataset:
    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_list([dict(zip(columns, map(as_text, pair), strict=True)) for pair in pairs])


# ---- Models


@functools.cache
def policy() -> Transformer:
    return make_model(V, torch.float32, spread=0.08, num_hidden_layers=1, tie_word_embeddings=False)


@functools.cache
def reference() -> Transformer:
    """The policy some steps ago: near enough for log-ratios that no sigmoid swallows."""
    model = copy.deepcopy(policy())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_model(ours: Transformer) -> LlamaForCausalLM:
    """The same weights in a Llama of transformers', under the same names."""
    shape = {name: getattr(ours.config, name) for name in SHAPE}
    rope = {"rope_type": "default", "rope_theta": ours.config.rope_theta}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    weights = ours.state_dict().items()
    theirs.load_state_dict({n if n.startswith("lm_head") else f"model.{n}": weight for n, weight in weights})
    return theirs


# ---- Our side and theirs


def our(loss: str, pairs: Rows = PAIRS, shift=(0.0, 0.0), delta=0.0, gap=0.0, **options) -> Said:
    """Our objective. `shift` is added to what the reference says of chosen and rejected answers; `delta` is
    bco_pair's after some steps; `gap` is the difference of the scores of all pairs."""
    objective = Objective(ObjectiveSettings(**{"beta": BETA, "loss": loss, **options}))
    objective.load_state_dict({"reward_sum": delta, "reward_count": 1.0})
    stream = build_stream(pairs, range(len(pairs)))
    policy_logps = policy()(stream)
    with torch.no_grad():
        reference_logps = reference()(stream)
    batch = objective.pairs(stream, policy_logps, reference_logps, policy(), reference())
    chosen, rejected = batch.reference_chosen_logps + shift[0], batch.reference_rejected_logps + shift[1]
    batch = replace(batch, reference_chosen_logps=chosen, reference_rejected_logps=rejected)
    batch = replace(batch, score_margins=torch.full_like(chosen, gap))
    value = objective(batch).mean()
    gradients = torch.autograd.grad(value, list(policy().parameters()))
    return Said(value.item(), torch.cat([gradient.flatten() for gradient in gradients]))


@functools.cache
def output_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # Trainers make one even if they write nothing.


def arguments(trainer: type, **options):
    """What every trainer of theirs is told: float32 on a CPU, nothing cut, nothing reported."""
    return CONFIGS[trainer](**{
        "output_dir": output_folder().name, "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "max_length": 512, "beta": BETA, **options,
    })  # fmt: skip


def make_trainer(trainer: type, rows: Dataset, **options):
    """`trainer` over `rows`, with our policy and, where it has one, our reference."""
    referee = {} if trainer in (CPOTrainer, ORPOTrainer) else {"ref_model": their_model(reference())}
    args, reader = arguments(trainer, **options), number_reader(V, END)
    return trainer(their_model(policy()), **referee, args=args, train_dataset=rows, processing_class=reader)


def said(trainer, inputs: dict) -> Said:
    """A batch through their `compute_loss`, and back."""
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    found = {name.removeprefix("model."): p.grad.flatten() for name, p in trainer.model.named_parameters()}
    return Said(value.item(), torch.cat([found[name] for name, _ in policy().named_parameters()]))


def their(*losses: str, pairs: Rows = PAIRS, shift=(0.0, 0.0), **options) -> Said:
    """DPOTrainer with these losses. With a `shift` it gets the reference's log-probs, as from its cache."""
    options |= {"loss_type": [*losses], "precompute_ref_log_probs": any(shift)}
    trainer = make_trainer(DPOTrainer, dataset_of(pairs), **options)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [tuple(row[name] for name in columns) for row in trainer.train_dataset] == pairs
    inputs = trainer.data_collator([*trainer.train_dataset])
    if any(shift):
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        inputs |= {"ref_chosen_logps": chosen + shift[0], "ref_rejected_logps": rejected + shift[1]}
    return said(trainer, inputs)


def their_experiment(trainer: type, pairs: Rows = PAIRS, **options) -> Said:
    """The same of CPOTrainer or ORPOTrainer."""
    run = make_trainer(trainer, dataset_of(pairs), **options)
    return said(run, run.data_collator([*run.train_dataset]))


def mean(parts) -> Said:
    values, gradients = zip(*parts, strict=True)
    return Said(sum(values) / len(values), torch.stack(gradients).mean(0))


def one_by_one(compute, *losses, pairs: Rows = PAIRS, **options) -> Said:
    """The mean over batches of one pair each."""
    return mean(compute(*losses, pairs=Rows([pair]), **options) for pair in pairs)


# ---- Near and far


def distance(one: Said, other: Said) -> tuple[float, float]:
    """How far apart the values and the gradients are, relative to the other's."""
    apart = (one.gradient - other.gradient).norm() / other.gradient.norm()
    return abs(one.value / other.value - 1), apart.item()


def assert_agree(one: Said, other: Said, gradient: float = 1e-6) -> None:
    """Within 1e-6 of the other, the value and the gradient as a vector."""
    values, gradients = distance(one, other)
    assert values < 1e-6, f"{one.value} and {other.value} are {values:.1e} apart"
    assert gradients < gradient, f"gradients are {gradients:.1e} apart; values {one.value}, {other.value}"


def assert_apart(one: Said, other: Said, *values: float) -> None:
    """The two numbers of a difference, which is one of the gradient as well."""
    assert (one.value, other.value) == pytest.approx(values, rel=1e-4)
    assert min(distance(one, other)) > 1e-3

"""The peers: TRL's DPOTrainer, and a textbook loop over padded rectangles, both on transformers' Llama."""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import SequentialSampler

from bench.work import BETA, Case, now
from errors import InputError
from model.transformer import Transformer
from training.settings import SAMPLE

try:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
except ImportError:
    raise InputError("bench compares with TRL: install the extra `parity`, as make bench does") from None

LR = 2e-4
PAD = 0


def as_llama(model: Transformer) -> LlamaForCausalLM:
    """The same weights in transformers' model."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        intermediate_size=c.intermediate_size, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, use_cache=False,
        tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    llama.load_state_dict({**weights, "lm_head.weight": model.embed_tokens.weight}, strict=True)
    return llama


# ---- TRL


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, *arguments, **options):
        self.times.append(now())


class GivenIds(DPOTrainer):
    """TRL's trainer over pairs that are ids already, in the order that is given."""

    seconds_of_reference = 0.0

    def _prepare_dataset(self, dataset, *arguments, **options):
        return dataset

    def _get_train_sampler(self, *arguments, **options):
        return SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *arguments, **options):
        start = now()
        dataset = super()._precompute_ref_logps(*arguments, **options)
        self.seconds_of_reference = now() - start
        return dataset


def trl_trainer(case: Case, folder: Path, pairs, model, reference, device: str, **options) -> DPOTrainer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SAMPLE / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    names = "prompt_ids", "chosen_ids", "rejected_ids"
    rows = [dict(zip(names, (ids.tolist() for ids in pair), strict=True)) for pair in pairs]
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        report_to="none",
        use_cpu=device == "cpu",
        beta=BETA,
        learning_rate=LR,
        max_length=case.max_length,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.pairs // case.micro_batch,
        num_train_epochs=1,
        precompute_ref_batch_size=case.micro_batch,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    return GivenIds(
        model, reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def train_trl(case: Case, folder: Path, pairs, model: Transformer, how: str, device, precision, say) -> float:
    """Seconds of the timed steps: "as shipped" (bf16, gradient checkpointing, a live reference), at its
    "defaults" but for the precision, or at its "best".
    """
    llama, best = as_llama(model), how == "best"
    options = {} if how == "as shipped" else dict(bf16=precision == "bf16")
    if best:
        options |= dict(precompute_ref_log_probs=True, gradient_checkpointing=False)
    reference = None if best else copy.deepcopy(llama)
    ordered = [pairs[row] for window in case.windows for row in window]
    trainer = trl_trainer(case, folder, ordered, llama, reference, device, **options)
    trainer.add_callback(clock := Clock())
    trainer.train()
    say(reference=trainer.seconds_of_reference, precision="bf16" if trainer.args.bf16 else "fp32")
    say(loss=[row["loss"] for row in trainer.state.log_history if "loss" in row][-1])
    return clock.times[-1] - clock.times[0]


def trl_loss(case: Case, folder: Path, pairs, policy: Transformer, reference: Transformer, device: str):
    """Its loss of all pairs in float32 under given weights of both models."""
    models = as_llama(policy), as_llama(reference)
    trainer = trl_trainer(case, folder, pairs, *models, device, bf16=False, gradient_checkpointing=False)
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(len(pairs))])
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)).item()


# ---- The textbook


def rectangle(pairs: list[list[np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen sides, then rejected ones, padded: ids, what is there, what is supervised; each (2B, L)."""
    rows = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    shape = len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, there, mask = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.from_numpy(np.concatenate([prompt, answer]))
        there[row, :length] = 1
        mask[row, len(prompt) : length] = 1
    return ids, there, mask


def padded_logps(llama, ids: Tensor, there: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of each side, (B,) twice: all positions meet the vocabulary, and a mask picks."""
    logits = llama(input_ids=ids, attention_mask=there).logits[:, :-1].float()  # (2B, L - 1, V)
    logps = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * mask[:, 1:]).sum(dim=1).chunk(2)


def textbook_losses(policy, reference, pairs) -> Tensor:
    batch = [x.to(policy.device) for x in rectangle(pairs)]
    chosen, rejected = padded_logps(policy, *batch)
    with torch.no_grad():
        reference_chosen, reference_rejected = padded_logps(reference, *batch)
    return -F.logsigmoid(BETA * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def train_textbook(case: Case, pairs, model: Transformer, device: str, precision: str, say) -> float:
    """One loop as tutorials have it, with a live reference."""
    policy = as_llama(model).to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    times = []
    for window in case.windows:
        for start in range(0, case.pairs, case.micro_batch):
            rows = window[start : start + case.micro_batch]
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                losses = textbook_losses(policy, reference, [pairs[row] for row in rows])
            (losses.sum() / case.pairs).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        say(loss=losses.mean().item())
    return times[-1] - times[0]

"""Log-probs, adapters and whole runs against TRL, peft and transformers."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import train_dpo
import train_sft
from dataset.packing import build_stream
from dataset.records import read_preferences
from dataset.store import open_store
from dataset.template import CHATML
from dataset.tokenizer import ChatTokenizer
from model.export import export, export_adapter
from model.lora import adapted_layers, adapter_weights, add_adapters
from model.weights import load_model
from tests.conftest import ROOT
from tests.loops import metrics
from tests.parity.conftest import write_tokenizer

SAMPLE = ROOT / "dataset" / "sample"
PAIRS = SAMPLE / "heldout.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of transformers' with the tokenizer of the bundled data."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    write_tokenizer(path, tokenizer, CHATML.source, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return path


def their_trainer(folder, tmp_path, model=None, **options) -> DPOTrainer:
    """TRL's trainer over the bundled held-out pairs, in float32 and without dropout."""
    rows = [
        {
            "prompt": [vars(message) for message in record.prompt],
            "chosen": [{"role": "assistant", "content": record.chosen}],
            "rejected": [{"role": "assistant", "content": record.rejected}],
        }
        for record in read_preferences(PAIRS)
    ]
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", bf16=False, use_cpu=True, max_length=None,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=reader)


@torch.no_grad()
def their_logps(trainer: DPOTrainer, start: int, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and token log-probs of each response, chosen and rejected by turns."""
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(start, start + count)])
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logps = trainer.model.eval()(**asked, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    mask, ids, found = inputs["completion_mask"][:, 1:].bool(), [], []
    for pair in range(count):
        for row in (pair, count + pair):
            ids.append(inputs["input_ids"][row, 1:][mask[row]].tolist())
            found.append(logps[row, -mask.shape[1] :][mask[row]].tolist())
    return ids, found


def test_token_log_probs_of_a_whole_file_are_trls(folder, tmp_path):
    """Every supervised token of every pair.

    ChatML's template writes a newline behind the end token, and TRL takes it for a part of the answer: one
    token more, which no chat ever asks a model for. It is the one difference, and it is shown here.
    """
    trainer = their_trainer(folder, tmp_path)
    tokenizer, model = ChatTokenizer(folder / "tokenizer.json"), load_model(folder)
    store = open_store(PAIRS, "preferences", tokenizer, max_length=512)
    newline, tokens = tokenizer.text("\n"), 0
    assert len(store) == len(trainer.train_dataset)
    for start in range(0, len(store), 20):
        count = min(20, len(store) - start)
        stream = build_stream(store, range(start, start + count))
        ids, logps = their_logps(trainer, start, count)
        with torch.no_grad():
            ours = model(stream).split(stream.lengths().tolist())
        targets = stream.targets.split(stream.lengths().tolist())
        for mine, said, theirs, expected in zip(ours, targets, ids, logps, strict=True):
            assert theirs == said.tolist() + newline
            torch.testing.assert_close(mine, torch.tensor(expected[:-1]), rtol=1e-5, atol=2e-5)
            tokens += len(mine)
    assert tokens > 5000


# ---- Adapters


# Adapters want a larger learning rate than whole matrices.
ADAPTED = ["--lora-rank", "4", "--lora-alpha", "16", "--lr", "0.02"]
OPTIONS = [
    "--precision", "fp32", "--batch-size", "16", "--max-steps", "6", "--warmup-steps", "0",
    "--log-every", "1", "--lr", "0.003",
]  # fmt: skip


def run_dpo(model, out, *options: str) -> None:
    data = ["--data", str(SAMPLE / "preferences.jsonl"), "--eval-data", str(PAIRS)]
    train_dpo.main(["--model", str(model), "--out", str(out), *data, *OPTIONS, *options])


def their_sums(model, folder, tmp_path, count: int = 40) -> torch.Tensor:
    """log pi of each response by TRL and transformers, without the newline behind it, (count, 2)."""
    trainer = their_trainer(folder, tmp_path, model=model)
    _, logps = their_logps(trainer, 0, count)
    return torch.tensor([sum(tokens[:-1]) for tokens in logps]).view(count, 2)


def our_sums(folder, count: int = 40) -> torch.Tensor:
    tokenizer = ChatTokenizer(folder / "tokenizer.json")
    stream = build_stream(open_store(PAIRS, "preferences", tokenizer, max_length=512), range(count))
    with torch.no_grad():
        return torch.stack(stream.sum_by_side(load_model(folder)(stream)), dim=1)


def test_peft_reads_our_adapter(folder, tmp_path):
    """On the model that the run started from, peft's adapter, ours merged, and peft's merge are one model."""
    run_dpo(folder, tmp_path / "run", *ADAPTED, "--lora-targets", "q_proj,o_proj,down_proj")
    export_adapter(tmp_path / "run", tmp_path / "adapter", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert theirs.peft_config["default"].base_model_name_or_path == str(folder)
    ours = our_sums(tmp_path / "run")
    assert (ours - our_sums(folder)).abs().max() > 0.1  # It has learned something.
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(their_sums(merged, folder, tmp_path), ours, rtol=1e-5, atol=1e-3)
    weights = load_model(tmp_path / "run").state_dict()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weights[name.removeprefix("model.")], weight, rtol=0, atol=1e-6)


def test_adapters_are_those_of_peft(folder):
    """The same names and shapes, nothing at first, and alpha / rank: what peft makes for the same options."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    ours = load_model(folder)
    add_adapters(ours, 4, 16.0, "q_proj,down_proj", seed=0)
    shapes = {
        name.removeprefix("base_model.model.model.").replace(".default.weight", ""): weight.shape
        for name, weight in theirs.state_dict().items()
        if ".lora_" in name
    }
    assert shapes == {name: weight.shape for name, weight in adapter_weights(ours).items()}
    scale = theirs.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert {layer.scale for layer in adapted_layers(ours).values()} == {scale} == {4.0}


@torch.no_grad()
def peft_sums(base, adapter, tmp_path, count: int = 40) -> torch.Tensor:
    """log pi of each response by peft, not merged, without the newline behind it, (count, 2)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    trainer = their_trainer(base, tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[place] for place in range(count)])
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    ids, mask = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:].bool()
    logps = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
    sums = torch.stack([row[place][:-1].sum() for row, place in zip(logps, mask, strict=True)])
    return sums.view(2, count).T


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter that peft has saved, with ranks and alphas of its own for some layers, far from zero."""
    options = dict(target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    patterns = dict(rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 3}, alpha_pattern={r".*\.v_proj": 5})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **options, **patterns))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("way", ["beside", "merged"])
def test_an_adapter_of_peft_is_the_start_of_policy_and_reference(folder, adapter, tmp_path, way):
    """peft measures the log-probs of the start, and with the exported adapter the margins of the run."""
    start = peft_sums(folder, adapter, tmp_path)
    assert (start - our_sums(folder)).abs().max() > 1
    out, more = tmp_path / "run", ["--merge-adapter"] if way == "merged" else ["--lr", "0.02"]
    run_dpo(folder, tmp_path / "start", "--adapter", str(adapter), *more, "--lr", "0")
    torch.testing.assert_close(our_sums(tmp_path / "start"), start, rtol=1e-5, atol=1e-3)
    run_dpo(folder, out, "--adapter", str(adapter), *more)
    rows = [row for row in metrics(out) if "eval_loss" in row]
    assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["eval_rewards/margins"] > 0.02
    if way == "merged":
        return
    count = sum(1 for _ in read_preferences(PAIRS))
    export_adapter(out, tmp_path / "trained", torch.float32)
    policy = peft_sums(folder, tmp_path / "trained", tmp_path, count)
    moved = policy - peft_sums(folder, adapter, tmp_path, count)
    margins = 0.1 * (moved[:, 0] - moved[:, 1])
    assert margins.mean().item() == pytest.approx(rows[-1]["eval_rewards/margins"], abs=1e-4)
    torch.testing.assert_close(policy[:40], our_sums(out), rtol=1e-5, atol=1e-3)


# ---- The whole way


@pytest.mark.parametrize("adapters", [[], ADAPTED], ids=["full", "lora"])
def test_sft_dpo_export_and_reload(folder, adapters, tmp_path):
    """From a folder of transformers' back to one: transformers measures the margins that the run logged."""
    sft, dpo, out = tmp_path / "sft", tmp_path / "dpo", tmp_path / "out"
    data = ["--data", str(SAMPLE / "sft.jsonl")]
    train_sft.main(["--model", str(folder), "--out", str(sft), *data, *OPTIONS, *adapters])
    run_dpo(sft, dpo, *adapters)
    rows = [row for row in metrics(dpo) if "eval_loss" in row]
    assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["eval_rewards/margins"] > 0.05

    export(dpo, out, torch.float32)
    export(sft, tmp_path / "sft-out", torch.float32)
    count = sum(1 for _ in read_preferences(PAIRS))
    policy, reference = (
        their_sums(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), path, tmp_path, count)
        for path in (out, tmp_path / "sft-out")
    )
    margins = 0.1 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    assert margins.mean().item() == pytest.approx(rows[-1]["eval_rewards/margins"], abs=1e-4)
    accuracy = (margins > 0).float().mean().item() + 0.5 * (margins == 0).float().mean().item()
    assert accuracy == pytest.approx(rows[-1]["eval_rewards/accuracies"], abs=2 / count)
    torch.testing.assert_close(our_sums(out), our_sums(dpo), rtol=0, atol=0)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"

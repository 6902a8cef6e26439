"""Our models and transformers', weight for weight, score for score, token for token."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.tokenizer import ChatTokenizer
from model.export import export
from model.generate import generate
from model.weights import load_model, save_model
from tests.conftest import TEXTS, make_model, turns
from tests.parity.conftest import V, their_model
from tests.test_model import all_logits

IDS = torch.randint(V, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def their_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def assert_same_scores(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-4 of the size of the scores, which is float32 over two layers."""
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_scores_are_transformers(folder):
    """A rotation, a norm or a bias that is read otherwise gives a model that talks, only worse."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_same_scores(all_logits(load_model(folder), IDS), their_logits(theirs, IDS))


def test_scores_of_float64_show_that_nothing_else_differs(folder):
    """What float32 hides: the two now differ as far as their rotary tables do, which stay in float32."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        ours, expected = all_logits(load_model(folder).double(), IDS), theirs(torch.tensor([IDS])).logits[0]
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_load_into_float32(family, dtype, tmp_path):
    """Each number of the file, and no other, whatever it is computed in afterwards."""
    their_model(family).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(weight.dtype == torch.float32 for weight in ours.state_dict().values())
    with torch.no_grad():
        assert_same_scores(all_logits(ours, IDS), their_logits(theirs, IDS))


def test_shards_are_one_model(family, folder, tmp_path):
    theirs = their_model(family)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, parts = load_model(folder).state_dict(), load_model(tmp_path).state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_read_back_by_transformers(family, folder, dtype, tmp_path):
    """Folder → run → export → transformers: not a bit of a weight changes, and the config means the same."""
    save_model(tmp_path / "run", load_model(folder))
    ChatTokenizer(folder / "tokenizer.json").save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", dtype)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    after, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    weights = after.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert torch.equal(their_logits(after, IDS), their_logits(before, IDS))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"


def test_greedy_answers_are_transformers(folder):
    """Token for token, from prompts of different lengths in one batch against one at a time."""
    tokenizer, model = ChatTokenizer(folder / "tokenizer.json"), load_model(folder)
    theirs, reader = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [turns(TEXTS[0]), turns("Hi", "Hello.", TEXTS[3]), turns("?", system="Short.")]
    prompts = [tokenizer.prompt(messages) for messages in asked]
    answers = generate(model, prompts, tokenizer.end_id, max_new_tokens=24, temperature=0)
    for messages, prompt, answer in zip(asked, prompts, answers, strict=True):
        said = [vars(message) for message in messages]
        inputs = reader.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.end_id)
        expected = theirs.generate(**inputs, **options)
        assert answer.tokens == [t for t in expected[0, len(prompt) :].tolist() if t != tokenizer.end_id]


def test_a_run_of_ours_speaks_as_it_did(tokenizer, tmp_path):
    """A tokenizer that this project trained: its ids, template and end token, read by transformers."""
    save_model(tmp_path / "run", make_model(tokenizer.vocab_size, torch.float32))
    tokenizer.save(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", torch.float32)
    reader = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == reader.eos_token_id == tokenizer.end_id
    for text in TEXTS:
        assert reader(text)["input_ids"] == tokenizer.text(text)
    asked = turns(TEXTS[0], TEXTS[3], TEXTS[4], system="Short.")
    said = [vars(message) for message in asked]
    theirs = reader.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert theirs == tokenizer.prompt(asked)

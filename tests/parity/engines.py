"""An engine answers from an export, in its own environment: `test_engines.py` runs this with ENGINES_PYTHON.

    python engines.py {vllm,llama_cpp} ASKED.json SAID.json FOLDER...

ASKED holds `ids`, whose log-probs are wanted, `prompts`, to be answered greedily, `conversations` and `end`.
Nothing of MiniDPO is imported here, and only the engine that is asked.
"""

import json
import math
import os
import sys
from pathlib import Path

TOKENS = 24  # an answer at most


def vllm(asked: dict, folder: str) -> dict:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    scores = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    [scored] = engine.generate([{"prompt_token_ids": asked["ids"]}], scores)
    found = zip(scored.prompt_logprobs[1:], asked["ids"][1:], strict=True)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], greedy)
    chats = engine.chat(asked["conversations"], greedy)
    return {
        "logps": [choices[token].logprob for choices, token in found],
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "prompts": [chat.prompt_token_ids for chat in chats],
    }


def llama_cpp(asked: dict, folder: str) -> dict:
    from llama_cpp import Llama

    # Type 0 is float32; the default, float16, shows in the third digit of a score.
    exact = dict(type_k=0, type_v=0, flash_attn=False, logits_all=True, n_ctx=512, n_batch=512)
    engine = Llama(convert(folder), verbose=False, **exact)
    engine.eval(asked["ids"])
    scores = engine.scores[: len(asked["ids"])].tolist()
    answers = []
    for prompt in asked["prompts"]:
        engine.reset()
        answers.append([])
        for token in engine.generate(prompt, top_k=1, temp=0, repeat_penalty=1):
            answers[-1].append(token)
            if token == asked["end"] or len(answers[-1]) == TOKENS:
                break
    texts = [message["content"] for messages in asked["conversations"] for message in messages]
    return {
        "logps": [log_softmax(row)[token] for row, token in zip(scores, asked["ids"][1:], strict=False)],
        "answers": answers,
        "texts": [engine.tokenize(text.encode(), add_bos=False, special=False) for text in texts],
    }


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(score - max(row)) for score in row)) + max(row)
    return [score - total for score in row]


def convert(folder: str) -> str:
    """A GGUF file by llama.cpp's converter, which is told the pre-tokenizer: see docs/MODELS.md."""
    sys.path.insert(0, os.environ["LLAMA_CPP"])
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    sys.argv = ["convert", folder, "--outtype", "f32", "--outfile", f"{folder}.gguf"]
    convert_hf_to_gguf.main()
    return f"{folder}.gguf"


if __name__ == "__main__":
    name, asked, said, *folders = sys.argv[1:]
    engine, asked = {"vllm": vllm, "llama_cpp": llama_cpp}[name], json.loads(Path(asked).read_text())
    Path(said).write_text(json.dumps({Path(folder).name: engine(asked, folder) for folder in folders}))

"""How fast are answers generated? Ours and transformers' `generate`, on the same weights and prompts.

    python -m bench.generation                   # make bench runs it as well
    python -m bench.generation --quick           # does everything work?
    python -m bench.generation --rounds 5 --json FILE

First the greedy answers of both in float32 are compared. Then each run is a process of its own, and the order
turns around from round to round. All answers have the full length. A first short call is not timed.
"""

import argparse
import json
import statistics
from dataclasses import dataclass

import torch

from bench.run import look_at, save, worker
from bench.tables import header, line
from bench.work import TINY, Case, make_model, now, peak_bytes
from errors import InputError, run_script
from model.config import PRESETS
from model.generate import generate
from training.precision import cpu_multiplies_bf16

THEIRS, OURS = "transformers", "ours"
NEVER = -1  # No token ends an answer.


@dataclass(frozen=True)
class Work:
    """A model, prompts of equal length, and the length of their answers."""

    case: Case
    prompts: int
    length: int
    new_tokens: int

    def ids(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            10, self.case.vocabulary, (self.prompts, self.length), generator=generator
        ).tolist()


WORK = Work(Case(PRESETS["26m"], 6400, 1024, pairs=1, steps=1), prompts=32, length=64, new_tokens=128)
QUICK = Work(Case(TINY, 2048, 256, pairs=1, steps=1), prompts=3, length=8, new_tokens=8)


def answers(work: Work, who: str, precision: str, samples: int, greedy: bool = False) -> tuple[list, float]:
    """The tokens of all answers, and the seconds that they took."""
    model, prompts = make_model(work.case).eval(), work.ids()
    if who == OURS:

        def run(tokens: int) -> list:
            options = dict(temperature=0 if greedy else 1, samples=samples, batch_size=512)
            return [answer.tokens for answer in generate(model, prompts, NEVER, tokens, **options)]
    else:
        from bench.peers import as_llama

        llama, ids = as_llama(model).eval(), torch.tensor(prompts)
        if precision == "bf16":
            llama = llama.bfloat16()

        def run(tokens: int) -> list:
            options = dict(do_sample=not greedy, top_k=0, num_return_sequences=samples, use_cache=True)
            lengths = dict(max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
            mask = torch.ones_like(ids)
            return llama.generate(ids, attention_mask=mask, **options, **lengths)[:, ids.shape[1] :].tolist()

    enabled = who == OURS and precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        run(2)
        start = now()
        tokens = run(work.new_tokens)
    return tokens, now() - start


def check(work: Work) -> dict:
    """Raise `InputError` if the greedy answers in float32 differ."""
    ours, theirs = (answers(work, who, "fp32", 1, greedy=True)[0] for who in (OURS, THEIRS))
    if ours != theirs:
        raise InputError("the greedy answers differ, so times mean nothing")
    return {"tokens": sum(map(len, ours))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8], help="answers of each prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default="runs/bench-generation.json", help="where the figures are saved")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = QUICK if options.quick else WORK
    if options.worker is not None:
        print(json.dumps(one(work, *options.worker) if options.worker else check(work)))
        return
    quick = ["--quick"] if options.quick else []

    def run(*which: str) -> dict:
        return worker([*quick, "--worker", *which], options.threads, "bench.generation")

    machine, _ = look_at("cpu", options.threads)
    print(f"{machine}\n{run()['tokens']} greedy tokens agree", flush=True)
    precisions = ["fp32", *(["bf16"] if cpu_multiplies_bf16() else [])]
    kinds = [(who, p, str(n)) for n in options.samples for p in precisions for who in (THEIRS, OURS)]
    runs: dict[tuple, list[dict]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            runs[kind].append(run(*kind))
            print(
                f"round {number + 1}  {' '.join(kind):<24} {runs[kind][-1]['rate']:10,.0f} tokens/s",
                flush=True,
            )
    print(f"\n{table(runs)}")
    save(options.json, {"machine": machine, "runs": {" ".join(kind): its for kind, its in runs.items()}})


def one(work: Work, who: str, precision: str, samples: str) -> dict:
    """Tokens a second and peak memory of one run."""
    tokens, seconds = answers(work, who, precision, int(samples))
    return {"rate": sum(map(len, tokens)) / seconds, "peak_bytes": peak_bytes("cpu")}


def table(runs: dict[tuple, list[dict]]) -> str:
    """Median rates, as Markdown: ratios to transformers in float32 with as many answers of each prompt."""
    lines = header("answers a prompt", "", "tokens/s (range)", f"× {THEIRS}, fp32", "peak, GB", "rounds")
    for (who, precision, samples), its in runs.items():
        rates = [run["rate"] for run in its]
        rate, base = (
            statistics.median(run["rate"] for run in some) for some in (its, runs[THEIRS, "fp32", samples])
        )
        spread = f"{rate:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        peak = statistics.median(run["peak_bytes"] for run in its) / 1e9
        lines.append(
            line(samples, f"{who}, {precision}", spread, f"{rate / base:.2f}", f"{peak:.2f}", len(its))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)

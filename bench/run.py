"""How fast is it? Ours, TRL and a textbook loop on the same pairs and weights, each in fresh processes.

    make bench                                   # installs TRL, then runs everything
    python -m bench.run --quick                  # does everything work?
    python -m bench.run --pairs 4 --minutes 10   # what fits, on two cores; the tables say how many rounds did
    python -m bench.run --cases "26M, length 1024" --rounds 5 --steps 4 --json FILE

First the losses of all implementations are compared under the same weights; a benchmark of different things
is worth nothing. Then each runs the same optimizer steps (forward, backward, clipping, AdamW), the same pairs
in the same order, in a process of its own; the order turns around from round to round, so that a machine that
warms up or is disturbed favours nobody. A first short step warms up and is not timed. Everything is float32
on the CPU. What is printed and saved: the median over rounds, and the range.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import work
from bench.work import CASES, QUICK, Case
from errors import InputError, run_script

ROOT = Path(__file__).resolve().parent.parent
IMPLEMENTATIONS = {
    "TRL, defaults": "checkpointed activations, live reference; float32 instead of bf16",
    "TRL, best": "no checkpointing, precomputed reference",
    "textbook, padded": "padded rectangles, all positions meet the vocabulary, live reference",
    "ours, twin live": "no padding, only supervised positions meet the vocabulary",
    "ours, forked live": "the default: a prompt is computed once",
    "ours, forked cached": "the reference asked once",
    "ours, forked cached --checkpoint-activations": "less memory",
    "ours, forked cached --matmul-precision medium": "bf16 factors where the hardware gains from it",
}


# ---- One run, in a process of its own


def run_one(case: Case, implementation: str) -> dict:
    """Seconds of the timed steps and of asking a reference beforehand, peak memory, the last loss."""
    said: dict = {}
    pairs, model = work.synthetic_pairs(case), work.make_model(case)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if implementation.startswith("ours"):
            from bench import ours

            work.write_model(folder / "model", case)
            store = work.write_store(folder / "store", pairs)
            del model
            seconds = ours.train(case, folder, store, implementation.removeprefix("ours, "), said.update)
        else:
            from bench import peers

            if implementation.startswith("TRL"):
                best = implementation.endswith("best")
                seconds = peers.train_trl(case, folder, pairs, model, best, said.update)
            else:
                seconds = peers.train_textbook(case, pairs, model, said.update)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak_bytes": peak, "reference": 0.0, **said}


def check(case: Case) -> dict[str, float]:
    """The loss of the same pairs under the same two models, by everyone; they must agree.

    Ours in float64, both layouts, to 1e-9; the others in float32 to 1e-3, which is what float32 sums of
    hundreds of log-probs leave.
    """
    from bench import peers
    from dataset.packing import build_stream
    from losses import sigmoid
    from objective import Pairs

    pairs = [work.synthetic_pairs(case)[row] for row in case.windows[1]]
    policy, reference = work.make_model(case), work.make_model(case, seed=1)
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found["TRL"] = peers.trl_loss(case, Path(folder), pairs, policy, reference)
        two = peers.as_llama(policy), peers.as_llama(reference)
        found["textbook"] = peers.textbook_losses(*two, pairs).mean().item()
        store = work.write_store(Path(folder) / "store", pairs)
        policy, reference = policy.double(), reference.double()
        for layout in ("forked", "twin"):
            stream = build_stream(store, range(len(store)), layout)
            batch = Pairs.of(stream, policy(stream), reference(stream))
            margins = batch.chosen_logratios - batch.rejected_logratios
            found[f"ours, {layout}"] = sigmoid(margins, work.BETA).mean().item()
    ours = found["ours, twin"]
    if abs(found["ours, forked"] - ours) > 1e-9 or any(abs(x - ours) > 1e-3 for x in found.values()):
        raise InputError(f"the losses differ, so times mean nothing: {found}")
    return found


def worker(arguments: list[str], threads: int) -> dict:
    """Run this file again with these arguments; what it prints last is its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"HF_HOME": cache, "MINIDPO_CACHE": cache}
        result = subprocess.run(
            [sys.executable, "-m", "bench.run", *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode:
        raise InputError(f"bench.run {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# ---- All runs, and what is said of them


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """All cases: what they are, and the runs of each implementation, case by case within a round."""
    deadline, found = time.perf_counter() + 60 * options.minutes, {}
    for name, case in options.cases.items():
        losses = worker([*given(name, case, options), "--check"], options.threads)
        print(f"{name}: losses agree, {losses['ours, forked']:.6f}", flush=True)
        found[name] = {"losses": losses, **describe(case), "runs": {one: [] for one in options.only}}
    for number in range(options.rounds):
        for name, case in options.cases.items():
            for one in options.only if number % 2 == 0 else reversed(options.only):
                if time.perf_counter() < deadline:
                    run = worker([*given(name, case, options), "--worker", one], options.threads)
                    found[name]["runs"][one].append(run)
                    print(f"round {number + 1}  {name:<20} {one:<46} {run['seconds']:8.2f} s", flush=True)
    return found


def given(name: str, case: Case, options: argparse.Namespace) -> list[str]:
    sizes = ["--steps", str(case.steps), "--pairs", str(case.pairs)]
    return ["--cases", name, *sizes, *(["--quick"] if options.quick else [])]


def describe(case: Case) -> dict[str, int]:
    """How much the timed steps hold, and what they cost at least."""
    pairs, rows = work.synthetic_pairs(case), work.timed(case)
    with tempfile.TemporaryDirectory() as folder:
        store = work.write_store(Path(folder), pairs)
        # Every prompt twice, once for each side: what the peers' rows hold besides padding.
        tokens = int(store.lengths[rows].sum()) + sum(len(pairs[row][0]) for row in rows)
        return {"pairs": len(rows), "tokens": tokens, "flops": work.run_flops(case, store)}


COLUMNS = (
    "implementation", "rounds", "s, median (range)", "pairs/s", "tokens/s", "× TRL, defaults", "× TRL, best",
    "one epoch × TRL, defaults", "peak GB", "of TRL's, defaults", "GFLOP/s", "share of rate", "reference, s",
)  # fmt: skip


def table(name: str, figures: dict, rate: float) -> str:
    """The figures of a case as Markdown.

    "One epoch" counts asking the reference about these pairs once, where it is asked beforehand.
    """
    seconds, peak, asking = (
        {one: statistics.median(run[key] for run in runs) for one, runs in figures["runs"].items() if runs}
        for key in ("seconds", "peak_bytes", "reference")
    )
    lines = [
        f"{name}: {figures['pairs']} pairs, {figures['tokens']:,} tokens, {figures['flops'] / 1e9:.0f} GFLOP",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for one, median in seconds.items():
        times, speed = [run["seconds"] for run in figures["runs"][one]], figures["flops"] / median
        default, best = seconds.get("TRL, defaults", float("nan")), seconds.get("TRL, best", float("nan"))
        cells = [
            one,
            len(times),
            f"{median:.2f} ({min(times):.2f} to {max(times):.2f})",
            f"{figures['pairs'] / median:.2f}",
            f"{figures['tokens'] / median:,.0f}",
            f"{default / median:.2f}",
            f"{best / median:.2f}",
            f"{default / (median + asking[one]):.2f}",
            f"{peak[one] / 1e9:.2f}",
            f"{peak[one] / peak.get('TRL, defaults', float('nan')):.2f}",
            f"{speed / 1e9:.1f}",
            f"{speed / rate:.0%}",
            f"{asking[one]:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: does everything work?")
    parser.add_argument("--cases", nargs="+", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--only", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed optimizer steps a run, instead of the case's own")
    parser.add_argument("--pairs", type=int, help="pairs an optimizer step, instead of the case's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=60, help="start no run after these")
    parser.add_argument("--json", default="runs/bench.json", help="where the figures are saved")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = QUICK if options.quick else CASES
    if unknown := set(options.cases or ()) - known.keys():
        raise InputError(f"--cases {unknown.pop()}: there are {', '.join(known)}")
    chosen = {name: known[name] for name in options.cases or known}
    options.cases = {
        name: replace(case, steps=options.steps or case.steps, pairs=options.pairs or case.pairs)
        for name, case in chosen.items()
    }
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.worker or options.check:
        [case] = options.cases.values()
        print(json.dumps(check(case) if options.check else run_one(case, options.worker)))
        return
    torch.set_num_threads(options.threads)
    rate = work.matrix_rate()
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} threads"
    machine += f", torch {torch.__version__}"
    print(f"{machine}; float32 matrix products: {rate / 1e9:.1f} GFLOP/s")
    found = measure(options)
    for name, figures in found.items():
        print(f"\n{table(name, figures, rate)}")
    print("\n" + "\n".join(f"{one}: {IMPLEMENTATIONS[one]}" for one in options.only))
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine, "rate": rate, "cases": found}
    Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nsaved in {options.json}")


if __name__ == "__main__":
    run_script(main)

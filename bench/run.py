"""How fast is it? Ours, TRL and a textbook loop on the same pairs and weights, each in fresh processes.

    make bench                                   # installs TRL, then runs everything
    python -m bench.run --quick                  # does everything work?
    python -m bench.run --pairs 4 --minutes 10   # what fits, on two cores; the tables say how many rounds did
    python -m bench.run --cases "26M, length 1024" --rounds 5 --steps 4 --json FILE
    python -m bench.run --precision bf16         # on the CPU, where the default is float32
    python -m bench.run --device cuda            # larger cases, on a GPU, in bf16 unless --precision fp32

First the losses of all implementations are compared under the same weights; a benchmark of different things
is worth nothing. Then each runs the same optimizer steps (forward, backward, clipping, AdamW), the same pairs
in the same order, in a process of its own; the order turns around from round to round, so that a machine that
warms up or is disturbed favours nobody. A first step warms up and is not timed. All run in one precision,
but for the two that run as shipped. What is printed and saved: the median over rounds, and the range.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import work
from bench.tables import SHIPPED, tables
from bench.work import CASES, CUDA_CASES, QUICK, Case
from errors import InputError, run_script
from training.distributed import pick_device
from training.precision import cpu_multiplies_bf16
from training.settings import ROOT

FUSED = "ours, forked cached --fused-attention"
IMPLEMENTATIONS = {
    SHIPPED: "its defaults untouched: bf16, checkpointed activations, live reference",
    "TRL, defaults": "the same in everyone's precision",
    "TRL, best": "no checkpointing, precomputed reference",
    "textbook, padded": "padded rectangles, all positions meet the vocabulary, live reference",
    "ours, twin live": "no padding, only supervised positions meet the vocabulary",
    "ours, forked live": "the default: a prompt is computed once",
    "ours, forked live --precision auto": "as shipped: bf16 where the hardware multiplies in it",
    "ours, forked cached": "the reference asked once",
    "ours, forked cached --checkpoint-activations": "less memory",
    "ours, forked cached --micro-batch-tokens 1024": "the same step in more forwards: less memory",
    "ours, forked cached --micro-batch-tokens 512 --checkpoint-activations": "least memory",
    "ours, forked cached --matmul-precision medium": "bf16 factors where the hardware gains from it",
    FUSED: "one attention call a layer, on a GPU",
}


# ---- One run, in a process of its own


def run_one(case: Case, implementation: str, device: str, precision: str) -> dict:
    """Seconds of the timed steps and of asking a reference beforehand, peak memory, the last loss.

    The reference is asked about the pairs to warm up as well, which is taken off again by their tokens.
    """
    said: dict = {"reference": 0.0, "precision": precision}
    pairs, model = work.make_pairs(case), work.make_model(case)
    where = device, precision, said.update
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if implementation.startswith("ours"):
            from bench import ours

            work.write_model(folder / "model", case)
            store = work.write_store(folder / "store", pairs)
            del model
            seconds = ours.train(case, folder, store, implementation.removeprefix("ours, "), *where)
        else:
            from bench import peers

            if implementation.startswith("TRL"):
                how = implementation.removeprefix("TRL, ")
                seconds = peers.train_trl(case, folder, pairs, model, how, *where)
            else:
                seconds = peers.train_textbook(case, pairs, model, *where)
    said["reference"] *= work.tokens(pairs, work.timed(case)) / work.tokens(pairs, range(len(pairs)))
    return {"seconds": seconds, "peak_bytes": work.peak_bytes(device), **said}


def check(case: Case, device: str) -> dict[str, float]:
    """The loss of the same pairs under the same two models, by everyone; they must agree.

    Ours in float64, both layouts, to 1e-9; the others in float32 to 1e-3, which is what float32 sums of
    hundreds of log-probs leave.
    """
    from bench import peers
    from dataset.packing import build_stream
    from losses import sigmoid
    from training.objective import Pairs

    pairs = [work.make_pairs(case)[row] for row in case.windows[1][: case.micro_batch]]
    policy, reference = work.make_model(case), work.make_model(case, seed=1)
    found = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found["TRL"] = peers.trl_loss(case, Path(folder), pairs, policy, reference, device)
        two = peers.as_llama(policy).to(device), peers.as_llama(reference).to(device)
        found["textbook"] = peers.textbook_losses(*two, pairs).mean().item()
        store = work.write_store(Path(folder) / "store", pairs)
        policy, reference = policy.double().to(device), reference.double().to(device)
        for layout in ("forked", "twin"):
            stream = build_stream(store, range(len(store)), layout).to(device)
            batch = Pairs.of(stream, policy(stream), reference(stream))
            margins = batch.chosen_logratios - batch.rejected_logratios
            found[f"ours, {layout}"] = sigmoid(margins, work.BETA).mean().item()
    ours = found["ours, twin"]
    if abs(found["ours, forked"] - ours) > 1e-9 or any(abs(x - ours) > 1e-3 for x in found.values()):
        raise InputError(f"the losses differ, so times mean nothing: {found}")
    return found


def worker(arguments: list[str], threads: int, module: str = "bench.run") -> dict:
    """Run this file, or another, with these arguments; what it prints last is its result."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL would share its batches out to all cards.
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"HF_HOME": cache}
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode:
        raise InputError(f"{module} {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# ---- All runs, and what is said of them


def measure(options: argparse.Namespace) -> dict[str, dict]:
    """All cases: what they are, and the runs of each implementation, case by case within a round."""
    deadline, found = time.perf_counter() + 60 * options.minutes, {}
    for name, case in options.cases.items():
        losses = worker([*given(name, case, options), "--check"], options.threads)
        print(f"{name}: losses agree, {losses['ours, forked']:.6f}", flush=True)
        found[name] = {"losses": losses, **describe(case), "runs": {one: [] for one in options.only}}
        found[name]["out_of_memory"] = []
    for number in range(options.rounds):
        for name, case in options.cases.items():
            for one in options.only if number % 2 == 0 else reversed(options.only):
                if time.perf_counter() > deadline or one in found[name]["out_of_memory"]:
                    continue
                print(f"round {number + 1}  {name:<22} {one:<46}", end=" ", flush=True)
                try:
                    run = worker([*given(name, case, options), "--worker", one], options.threads)
                except InputError as error:
                    if "out of memory" not in str(error):
                        raise
                    found[name]["out_of_memory"].append(one)  # Where one does not fit, others may.
                    print("out of memory", flush=True)
                    continue
                found[name]["runs"][one].append(run)
                print(f"{run['seconds']:8.2f} s", flush=True)
    return found


def given(name: str, case: Case, options: argparse.Namespace) -> list[str]:
    how = ["--steps", str(case.steps), "--pairs", str(case.pairs)]
    how += ["--device", options.device, "--precision", options.precision]
    return ["--cases", name, *how, *(["--quick"] if options.quick else [])]


def describe(case: Case) -> dict[str, int]:
    """How much the timed steps hold, and what they cost at least."""
    pairs, rows = work.make_pairs(case), work.timed(case)
    with tempfile.TemporaryDirectory() as folder:
        flops = work.run_flops(case, work.write_store(Path(folder), pairs))
    return {"pairs": len(rows), "tokens": work.tokens(pairs, rows), "flops": flops}


def usual(device: str, precision: str) -> list[str]:
    """All but what trains on CUDA only; and TRL as shipped, where its defaults are in bf16 already, or a CPU
    would emulate it for hours."""
    left_out = {FUSED} if device == "cpu" else set()
    if precision == "bf16" or (device == "cpu" and not cpu_multiplies_bf16()):
        left_out.add(SHIPPED)
    return [one for one in IMPLEMENTATIONS if one not in left_out]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: does everything work?")
    parser.add_argument("--cases", nargs="+", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="without it bf16 on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed optimizer steps a run, instead of the case's own")
    parser.add_argument("--pairs", type=int, help="pairs an optimizer step, instead of the case's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=60, help="start no run after these")
    parser.add_argument("--json", default="runs/bench.json", help="where the figures are saved")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.only = options.only or usual(options.device, options.precision)
    known = QUICK if options.quick else CUDA_CASES if options.device == "cuda" else CASES
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
        device, how = options.device, options.precision
        found = check(case, device) if options.check else run_one(case, options.worker, device, how)
        print(json.dumps(found))
        return
    machine, rates = look_at(options.device, options.threads)
    print(f"timed in {options.precision} on {machine}")
    if missing := [one for one in IMPLEMENTATIONS if one not in options.only]:
        print(f"left out: {'; '.join(missing)}")
    for name in [name for name, case in options.cases.items() if not work.is_here(case)]:
        print(f"{name}: left out, there is no {work.DATA / options.cases.pop(name).data}")
    found = measure(options)
    for name, figures in found.items():
        print(f"\n{tables(name, figures, rates)}")
    print("\n" + "\n".join(f"{one}: {IMPLEMENTATIONS[one]}" for one in options.only))
    save(options.json, {"machine": machine, "precision": options.precision, "rates": rates, "cases": found})


def look_at(device: str, threads: int) -> tuple[str, dict[str, float]]:
    """What the machine is, and its rate of matrix products, FLOP/s in each precision."""
    pick_device(device)  # Refuses a GPU that is not there.
    torch.set_num_threads(threads)
    rates = {
        name: work.matrix_rate(device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    said = ", ".join(f"{rate / 1e9:,.1f} GFLOP/s in {name}" for name, rate in rates.items())
    kind = torch.cuda.get_device_name() if device == "cuda" else kind
    return f"{kind}, torch {torch.__version__}; matrix products: {said}", rates


def save(path: str, figures: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\nsaved in {path}")


if __name__ == "__main__":
    run_script(main)

"""What the runs of the benchmark say, as Markdown."""

import math
import statistics

EPOCHS = {"1 epoch": 1, "3 epochs": 3, "many": math.inf}
DEFAULTS, BEST, SHIPPED = "TRL, defaults", "TRL, best", "TRL, as shipped"


def per_epoch(run: dict, epochs: float) -> float:
    """Seconds of an epoch, with its part of asking the reference beforehand; of many epochs none is left."""
    return run["seconds"] + run["reference"] / epochs


def medians(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """The medians of each implementation that was run, and the range of its seconds."""
    found = {}
    for one, its in runs.items():
        if its:
            times = [run["seconds"] for run in its]
            found[one] = {"rounds": len(its), "precision": its[0]["precision"]}
            found[one] |= {"fastest": min(times), "slowest": max(times)}
            for key in ("seconds", "reference", "peak_bytes"):
                found[one][key] = statistics.median(run[key] for run in its)
    return found


def as_shipped(found: dict[str, dict]) -> dict | None:
    """TRL as it comes: a row of its own, or its defaults where those are in bf16."""
    defaults = found.get(DEFAULTS)
    return found.get(SHIPPED) or (defaults if defaults and defaults["precision"] == "bf16" else None)


def faster(base: dict | None, run: dict, epochs: float = math.inf) -> str:
    """How many times the time of `run` the `base` takes for as many epochs; empty without a base."""
    return f"{per_epoch(base, epochs) / per_epoch(run, epochs):.2f}" if base else ""


def of_peak(base: dict | None, run: dict) -> str:
    return f"{run['peak_bytes'] / base['peak_bytes']:.2f}" if base else ""


def tables(name: str, figures: dict, rates: dict[str, float]) -> str:
    """The figures of a case: time beside TRL's, then memory and rates."""
    size = f"{figures['pairs']} pairs, {figures['tokens']:,} tokens, {figures['flops'] / 1e9:.0f} GFLOP"
    found = medians(figures["runs"])
    lines = [f"{name}: {size}", "", *time_table(found), "", *rate_table(found, figures, rates)]
    if figures["out_of_memory"]:
        lines += ["", f"Out of memory: {'; '.join(figures['out_of_memory'])}"]
    return "\n".join(lines)


def time_table(found: dict[str, dict]) -> list[str]:
    """Ratios at an equal number of epochs; those to TRL's best, and to TRL as shipped, are of many."""
    defaults, best, shipped = found.get(DEFAULTS), found.get(BEST), as_shipped(found)
    ratios = [f"× TRL, defaults: {epochs}" for epochs in EPOCHS]
    lines = header("time", "rounds", "s (range)", "reference, s", *ratios, f"× {BEST}", f"× {SHIPPED}")
    for one, run in found.items():
        times = f"{run['seconds']:.2f} ({run['fastest']:.2f} to {run['slowest']:.2f})"
        ratios = [faster(defaults, run, epochs) for epochs in EPOCHS.values()]
        ratios += [faster(best, run), faster(shipped, run)]
        lines.append(line(one, run["rounds"], times, f"{run['reference']:.2f}", *ratios))
    return lines


def rate_table(found: dict[str, dict], figures: dict, rates: dict[str, float]) -> list[str]:
    """Peak memory, and rates; the last is the share of the machine's matrix rate in the run's precision."""
    speeds = "pairs/s", "tokens/s", "GFLOP/s", "of the matrix rate"
    lines = header("memory and rates", "peak, GB", f"of {DEFAULTS}", f"of {SHIPPED}", *speeds)
    for one, run in found.items():
        pairs, tokens, rate = (figures[key] / run["seconds"] for key in ("pairs", "tokens", "flops"))
        peaks = f"{run['peak_bytes'] / 1e9:.2f}", of_peak(found.get(DEFAULTS), run)
        share = f"{rate / rates[run['precision']]:.0%}" if run["precision"] in rates else ""
        speeds = f"{pairs:.2f}", f"{tokens:,.0f}", f"{rate / 1e9:.1f}", share
        lines.append(line(one, *peaks, of_peak(as_shipped(found), run), *speeds))
    return lines


def header(*columns: str) -> list[str]:
    return [line(*columns), "|" + "---|" * len(columns)]


def line(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"

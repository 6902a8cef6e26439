"""Pairs whose labels are wrong: which objective still learns what was meant?

    python -m eval.experiments.label_noise --model runs/sft --out runs/label_noise

Exchanges the two sides of a share of the training pairs and trains on them with DPO, with cDPO and robust
DPO, which are told that share, and with soft labels: the scores of a reward model that was trained on the
same noisy pairs and never saw others. Held-out pairs keep their true labels. A seed draws the pairs, the
flips and the order, the same for every objective. Writes OUT/results.json and OUT/label_noise.png.
"""

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import train_dpo
import train_reward
from dataset.records import DataError, Preference, read_records
from errors import InputError, run_script
from eval.common import write_json
from eval.experiments.real_data import as_json
from eval.report import BLUE, INK, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from training.settings import SAMPLE, flag, parse

NOISE = (0.0, 0.2, 0.4)  # shares of flipped pairs
OBJECTIVES = {  # label: flags, colour; cDPO and robust DPO are also told the share
    "DPO": (["--loss", "sigmoid"], INK),
    "cDPO": (["--loss", "sigmoid"], ORANGE),
    "robust": (["--loss", "robust"], VIOLET),
    "soft": (["--loss", "soft"], BLUE),
}
TOLD = ("cDPO", "robust")


@dataclass
class Settings:
    model: str = flag("runs/sft", "model folder to start from, also of the reward model")
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "pairs to draw from and to flip")
    eval_data: str = flag(str(SAMPLE / "heldout.jsonl"), "held-out pairs, whose labels are left alone")
    out: str = flag("runs/label_noise", "folder of the runs, the figures and the picture")
    seeds: int = flag(3, "runs of each objective, each on pairs and flips of its own")
    pairs: int = flag(200, "training pairs of a run")
    eval_pairs: int = flag(200, "held-out pairs, the first of the file")
    epochs: int = flag(3, "times every pair is seen: enough to learn wrong labels by heart")
    batch_size: int = flag(16, "pairs per optimizer step")
    lr: float = flag(5e-4, "peak learning rate of the objectives")
    reward_lr: float = flag(1e-3, "peak learning rate of the reward model")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    need_matplotlib()
    out = Path(settings.out)
    pairs, held_out = read(settings.data), read(settings.eval_data)[: settings.eval_pairs]
    if len(pairs) < settings.pairs:
        raise InputError(f"{settings.data}: has {len(pairs)} pairs, fewer than --pairs {settings.pairs}")
    write(out / "heldout.jsonl", held_out)
    accuracies: dict[str, dict[str, list[float]]] = {}  # of an objective, by the share of flipped pairs
    for seed in range(settings.seeds):
        for share in NOISE:
            folder = out / f"{share:.0%}-{seed}"
            write(folder / "noisy.jsonl", flipped(pairs, settings.pairs, share, seed))
            for name, accuracy in compare(settings, folder, share, seed).items():
                accuracies.setdefault(name, {}).setdefault(f"{share:.0%}", []).append(accuracy)
            write_json(out / "results.json", {"settings": asdict(settings), "accuracies": accuracies})
    draw(accuracies, out / "label_noise.png")
    print(f"\nheld-out reward accuracy: mean (range) of {settings.seeds} runs")
    for name, of_share in accuracies.items():
        for share, runs in of_share.items():
            print(f"{name:<14}{share:>4} flipped {mean(runs):>8.3f}  ({min(runs):.3f} to {max(runs):.3f})")


def read(path: str) -> list[Preference]:
    records = list(read_records(path))
    if bad := next((record for record in records if isinstance(record, DataError)), None):
        raise InputError(str(bad))
    return records


def write(path: Path, records: list[Preference]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(as_json(record), ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def flipped(pairs: list[Preference], count: int, share: float, seed: int) -> list[Preference]:
    """`count` of the pairs, drawn by `seed`, of which exactly `share` have their sides exchanged.

    With one seed the pairs are the same for every share, and a larger share flips what a smaller one did.
    """
    drawn = random.Random(seed).sample(pairs, count)
    wrong = round(share * count)
    return [replace(p, chosen=p.rejected, rejected=p.chosen) for p in drawn[:wrong]] + drawn[wrong:]


def compare(settings: Settings, folder: Path, share: float, seed: int) -> dict[str, float]:
    """Train with every objective on the noisy pairs of `folder`; the held-out accuracy of each.

    Without flips DPO alone: it is what the others can hope for.
    """
    noisy, held_out = folder / "noisy.jsonl", Path(settings.out) / "heldout.jsonl"
    how = ["--model", settings.model, f"--seed={seed}", "--overwrite"]
    how += [f"--epochs={settings.epochs}", f"--batch-size={settings.batch_size}"]
    accuracies = {}
    for name, (flags, _) in OBJECTIVES.items():
        if share == 0 and name != "DPO":
            continue
        data = [f"--data={noisy}", f"--eval-data={held_out}"]
        if name in TOLD:
            flags = [*flags, f"--label-smoothing={share}"]
        if name == "soft":
            reward = folder / "reward"
            scored, scored_held_out = folder / "scored.jsonl", folder / "scored-heldout.jsonl"
            train_reward.main([*how, *data, f"--out={reward}", f"--lr={settings.reward_lr}"])
            train_reward.main([f"--model={reward}", f"--score={noisy}", f"--to={scored}"])
            train_reward.main([f"--model={reward}", f"--score={held_out}", f"--to={scored_held_out}"])
            accuracies["reward model"] = held_out_accuracy(reward)
            data = [f"--data={scored}", f"--eval-data={scored_held_out}"]
        train_dpo.main([*how, *data, f"--out={folder / name}", f"--lr={settings.lr}", *flags])
        accuracies[name] = held_out_accuracy(folder / name)
    return accuracies


def held_out_accuracy(run: Path) -> float:
    """As the run's last evaluation, after its last step, found it."""
    *_, last = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return json.loads(last)["eval_rewards/accuracies"]


def draw(accuracies: dict[str, dict[str, list[float]]], out: Path) -> None:
    """A point an objective and share: the mean over the runs, with a line from the lowest to the highest."""
    with canvas(7, 3.9, out) as figure:
        axes = figure.subplots()
        plain(axes, "Held-out reward accuracy", "share of pairs; mean and range over the runs")
        for shift, (name, (_, colour)) in zip((-0.24, -0.08, 0.08, 0.24), OBJECTIVES.items(), strict=True):
            of_share = accuracies[name]
            places = [i + shift for i, share in enumerate(NOISE) if f"{share:.0%}" in of_share]
            runs = list(of_share.values())
            lowest, highest = list(map(min, runs)), list(map(max, runs))
            axes.vlines(places, lowest, highest, color=colour, linewidth=2, alpha=0.45)
            axes.plot(places, list(map(mean, runs)), "o", color=colour, markersize=7, label=name)
        axes.axhline(0.5, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xticks(range(len(NOISE)), [f"{share:.0%} flipped" for share in NOISE])
        axes.set_xlim(-0.5, len(NOISE) - 0.5)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor")
        figure.subplots_adjust(left=0.08, right=0.84, top=0.83, bottom=0.1)


if __name__ == "__main__":
    run_script(main)

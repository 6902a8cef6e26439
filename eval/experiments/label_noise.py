"""Train on pairs with wrong labels: which objective still learns the true preferences?

    python -m eval.experiments.label_noise --model runs/sft --out runs/label_noise

Exchanges the two sides of a share of the training pairs. Trains on them with DPO, with cDPO and robust DPO,
whose label smoothing is that share, and with soft labels: scores of a reward model trained on the same noisy
pairs. Held-out pairs keep their true labels. A seed draws pairs, flips and order, which are the same for
every objective.

Claims: with noisy labels cDPO (Mitchell 2023) and robust DPO (Ray Chowdhury et al. 2024, arXiv 2403.00409)
learn more than DPO.
"""

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import train_dpo
import train_reward
from dataset.records import Preference
from errors import InputError, run_script
from eval import score
from eval.experiments import common
from eval.experiments.common import draw_upright, over_runs, read_all, shown, table, write_lines
from eval.experiments.real_data import as_json
from eval.report import BLUE, INK, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from files import write_json
from training.settings import SAMPLE, flag, parse

NOISE = (0.0, 0.2, 0.4)  # shares of flipped pairs
SHARES = [f"{share:.0%}" for share in NOISE]
OBJECTIVES = {  # label: flags, colour
    "DPO": (["--loss", "sigmoid"], INK),
    "cDPO": (["--loss", "sigmoid"], ORANGE),
    "robust": (["--loss", "robust"], VIOLET),
    "soft": (["--loss", "soft"], BLUE),
}
SMOOTHED = ("cDPO", "robust")  # --label-smoothing is the share of flipped pairs


@dataclass
class Settings(common.Settings):
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "pairs to draw training pairs from")
    eval_data: str = flag(str(SAMPLE / "heldout.jsonl"), "held-out pairs, whose labels stay true")
    out: str = flag("runs/label_noise", "folder for the runs, the figures and the picture")
    pairs: int = flag(128, "number of training pairs")
    eval_pairs: int = flag(200, "number of held-out pairs, from the start of the file")
    epochs: int = flag(3, "passes over the pairs; three are enough to memorise wrong labels")
    batch_size: int = flag(16, "pairs per optimizer step")
    lr: float = flag(4e-4, "peak learning rate of the objectives")
    reward_lr: float = flag(1e-3, "peak learning rate of the reward model")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=5, eval_pairs=3, epochs=1)
    need_matplotlib()
    out = Path(settings.out)
    pairs, held_out = read_all(settings.data), read_all(settings.eval_data)[: settings.eval_pairs]
    if len(pairs) < settings.pairs:
        raise InputError(f"{settings.data}: has {len(pairs)} pairs, fewer than --pairs {settings.pairs}")
    write(out / "heldout.jsonl", held_out)
    accuracies: dict[str, dict[str, list[float]]] = {}  # objective: share of flipped pairs: seeds
    for seed in range(settings.seeds):
        for share in NOISE:
            folder = out / f"{share:.0%}-{seed}"
            write(folder / "noisy.jsonl", flipped(pairs, settings.pairs, share, seed))
            for name, accuracy in compare(settings, folder, share, seed).items():
                accuracies.setdefault(name, {}).setdefault(f"{share:.0%}", []).append(accuracy)
            write_json(out / "results.json", {"settings": asdict(settings), "accuracies": accuracies})
    draw(accuracies, out / "label_noise.png")
    print("\nheld-out reward accuracy\n\n" + summary(accuracies))


def write(path: Path, records: list[Preference]) -> None:
    """Write pairs as JSON lines. Creates the folder if necessary."""
    write_lines(path, map(as_json, records))


def flipped(pairs: list[Preference], count: int, share: float, seed: int) -> list[Preference]:
    """`count` random pairs; exactly the first `share` of them have their sides exchanged.

    For one seed every share has the same pairs, and a larger share also flips the pairs of a smaller one.
    """
    drawn = random.Random(seed).sample(pairs, count)
    wrong = round(share * count)
    return [replace(p, chosen=p.rejected, rejected=p.chosen) for p in drawn[:wrong]] + drawn[wrong:]


def compare(settings: Settings, folder: Path, share: float, seed: int) -> dict[str, float]:
    """Train every objective on the noisy pairs of `folder`; return the held-out accuracy of each.

    Without flips only DPO is trained: its accuracy is the upper limit for the others.
    """
    noisy, held_out = folder / "noisy.jsonl", Path(settings.out) / "heldout.jsonl"
    flags = ["--model", settings.model, f"--seed={seed}", "--overwrite"]
    flags += [f"--epochs={settings.epochs}", f"--batch-size={settings.batch_size}"]
    accuracies = {}
    for name, (loss, _) in OBJECTIVES.items():
        if share == 0 and name != "DPO":
            continue
        data = [f"--data={noisy}", f"--eval-data={held_out}"]
        if name in SMOOTHED:
            loss = [*loss, f"--label-smoothing={share}"]
        if name == "soft":
            reward = folder / "reward"
            scored, scored_held_out = folder / "scored.jsonl", folder / "scored-heldout.jsonl"
            train_reward.main([*flags, *data, f"--out={reward}", f"--lr={settings.reward_lr}"])
            score.main([f"--model={reward}", f"--data={noisy}", f"--out={scored}"])
            score.main([f"--model={reward}", f"--data={held_out}", f"--out={scored_held_out}"])
            accuracies["reward model"] = held_out_accuracy(reward)
            data = [f"--data={scored}", f"--eval-data={scored_held_out}"]
        train_dpo.main([*flags, *data, f"--out={folder / name}", f"--lr={settings.lr}", *loss])
        accuracies[name] = held_out_accuracy(folder / name)
    return accuracies


def held_out_accuracy(run: Path) -> float:
    """Reward accuracy of the run's last evaluation, after its last step."""
    *_, last = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return json.loads(last)["eval_rewards/accuracies"]


def summary(accuracies: dict[str, dict[str, list[float]]]) -> str:
    rows = [
        [name, *(shown(of_share[share], 3) if share in of_share else "" for share in SHARES)]
        for name, of_share in accuracies.items()
    ]
    return table(["", *(f"{share} flipped" for share in SHARES)], rows)


def draw(accuracies: dict[str, dict[str, list[float]]], out: Path) -> None:
    """A point per objective and share: the mean over the runs, with its interval."""
    with canvas(7, 3.9, out) as figure:
        axes = figure.subplots()
        plain(axes, "Held-out reward accuracy", "share of pairs; 95 % intervals over the seeds")
        for shift, (name, (_, colour)) in zip((-0.24, -0.08, 0.08, 0.24), OBJECTIVES.items(), strict=True):
            of_share = accuracies[name]
            places = [i + shift for i, share in enumerate(SHARES) if share in of_share]
            points = [over_runs(runs) for runs in of_share.values()]
            for place, point in zip(places, points, strict=True):
                draw_upright(axes, place, point, color=colour, linewidth=2, alpha=0.45)
            axes.plot(places, [p.value for p in points], "o", color=colour, markersize=7, label=name)
        axes.axhline(0.5, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xticks(range(len(NOISE)), [f"{share} flipped" for share in SHARES])
        axes.set_xlim(-0.5, len(NOISE) - 0.5)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor")
        figure.subplots_adjust(left=0.08, right=0.84, top=0.83, bottom=0.1)


if __name__ == "__main__":
    run_script(main)

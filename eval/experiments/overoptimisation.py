"""Over-optimisation: the implicit reward keeps rising; does the true reward follow?

    python -m eval.experiments.overoptimisation --model runs/sft --out runs/overoptimisation

Trains with DPO for many epochs on few pairs. After each epoch it measures the implicit reward on held-out
pairs (β (log-ratio of y_w − log-ratio of y_l)) and on the training pairs, and the true reward: the judge's
points, 0 to 3, for sampled answers to held-out prompts. KL(π ‖ π_ref) comes from the same answers.

Claim (Gao et al. 2022, arXiv 2210.10760, for reward models; Rafailov et al. 2024, arXiv 2406.02900, for DPO):
with growing KL the proxy rises, while the true reward rises, stops and falls.
"""

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from dataset.store import TokenStore
from errors import run_script
from eval.common import load_model_and_tokenizer
from eval.experiments import common
from eval.experiments.common import answer_logratios, dpo_steps, draw_curve, open_first, shown, table
from eval.judge import read_judged
from eval.report import BLUE, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from eval.verdict import score
from files import write_json
from model.generate import generate
from model.transformer import Transformer
from training.distributed import World, pick_device
from training.evaluate import evaluate
from training.objective import Objective, ObjectiveSettings
from training.precision import Precision
from training.settings import SAMPLE, flag, parse

CURVES = {  # figure: title, unit, colour
    "margin": ("Implicit reward", "held-out margin r_w − r_l", BLUE),
    "accuracy": ("Implicit accuracy", "share of held-out pairs with r_w > r_l", BLUE),
    "points": ("True reward", "points of the judge for sampled answers", ORANGE),
    "right": ("Right answers", "share of sampled answers", ORANGE),
    "kl": ("KL(π ‖ π_ref)", "nats per sampled answer", VIOLET),
    "chosen": ("Chosen answers", "held-out log π / π_ref, nats", VIOLET),
}


@dataclass
class Settings(common.DPOSettings):
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "training pairs")
    held_out: str = flag(str(SAMPLE / "heldout.jsonl"), "held-out pairs with a `judge` field")
    out: str = flag("runs/overoptimisation", "folder for the figures and the picture")
    pairs: int = flag(200, "training pairs, from the start of the file")
    prompts: int = flag(100, "held-out pairs and prompts, from the start of the file")
    epochs: int = flag(8, "passes over the pairs")
    lr: float = flag(5e-4, "peak learning rate")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=8, prompts=4, epochs=2, batch_size=4)
    need_matplotlib()
    runs = [run(settings, seed) for seed in range(settings.seeds)]
    out = Path(settings.out)
    write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, out / "overoptimisation.png")
    print("\n" + summary(runs))


def run(settings: Settings, seed: int) -> dict[str, list[float]]:
    """Train once. Returns for each figure of `CURVES` its values: before training and after each epoch."""
    policy, tokenizer = load_model_and_tokenizer(settings.model, pick_device("auto"))
    reference = copy.deepcopy(policy)
    out = Path(settings.out)
    training = open_first(settings.data, out / "train.jsonl", settings.pairs, tokenizer)
    pairs = open_first(settings.held_out, out / "heldout.jsonl", settings.prompts, tokenizer)
    records = read_judged(str(out / "heldout.jsonl"))

    def measured() -> dict[str, float]:
        return implicit(policy, reference, pairs, settings.beta) | true(
            policy, reference, tokenizer, records, seed
        )

    figures = [measured()]
    per_epoch = math.ceil(len(training) / settings.batch_size)
    flags = {key: getattr(settings, key) for key in ("model", "epochs", "batch_size", "lr", "beta")}
    for step in dpo_steps(policy.requires_grad_(True), reference, training, seed, **flags):
        if step.number % per_epoch == 0:
            figures.append(measured())
    return {name: [each[name] for each in figures] for name in CURVES}


def implicit(policy: Transformer, reference: Transformer, pairs: TokenStore, beta: float) -> dict[str, float]:
    """The implicit reward on pairs: its margin, its accuracy, and the chosen answers' log-ratio."""
    device = policy.embed_tokens.weight.device
    objective, world = Objective(ObjectiveSettings(beta=beta)), World(0, 1, device)
    found = evaluate(policy, reference, pairs, world, Precision("auto", device), objective)
    names = {"margin": "rewards/margins", "accuracy": "rewards/accuracies", "chosen": "logratios/chosen"}
    return {name: found[metric] for name, metric in names.items()}


def true(
    policy: Transformer, reference: Transformer, tokenizer, records: list, seed: int
) -> dict[str, float]:
    """The true reward of one sampled answer per prompt, the share of right ones, of ended ones, and KL."""
    prompts = [tokenizer.prompt(record["prompt"]) for record in records]
    answers = generate(policy, prompts, tokenizer.end_id, max_new_tokens=64, seed=seed, batch_size=200)
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    judged = zip(records, texts, answers, strict=True)
    verdicts = [score(record, text, answer.finished) for record, text, answer in judged]
    return {
        "points": mean(verdict.points for verdict in verdicts),
        "right": mean(verdict.right for verdict in verdicts),
        "ended": mean(answer.finished for answer in answers),
        "kl": answer_logratios(policy, reference, prompts, answers, tokenizer.end_id).mean().item(),
    }


def summary(runs: list[dict]) -> str:
    """A table: each figure after each epoch."""
    rows = [
        [str(epoch), *(shown([run[name][epoch] for run in runs]) for name in CURVES)]
        for epoch in range(len(runs[0]["kl"]))
    ]
    return table(["epoch", *(title for title, *_ in CURVES.values())], rows)


def draw(runs: list[dict], out: Path) -> None:
    """Each figure by epoch."""
    with canvas(11, 6.4, out) as figure:
        grid = figure.subplots(2, 3, sharex=True)
        for axes, (name, (title, unit, colour)) in zip(grid.T.flat, CURVES.items(), strict=True):
            epochs = range(len(runs[0][name]))
            plain(axes, title, unit)
            draw_curve(axes, epochs, [run[name] for run in runs], colour, "", marker="o", markersize=4)
            axes.set_xticks(epochs)
        for axes in grid[1]:
            axes.set_xlabel("epoch", color=PALE)
        figure.subplots_adjust(left=0.05, right=0.97, top=0.91, bottom=0.08, wspace=0.25, hspace=0.4)


if __name__ == "__main__":
    run_script(main)

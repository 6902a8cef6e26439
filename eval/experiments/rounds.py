"""Rounds of DPO on the policy's own answers: does it beat offline pairs, and what does a learned scorer cost?

    python -m eval.experiments.rounds --model runs/sft --out runs/rounds-experiment

All arms start from one SFT model. Offline DPO trains on bundled pairs. The others train in rounds on answers
of their own to the same prompts (`eval.rounds`), in as many passes. The scorer is the ground-truth judge; a
reward model that was trained on bundled pairs; or three of them, mean − std. RSO replaces the judge's pairs
of best against worst. After each round the policy answers held-out prompts. The true reward is the judge's
points, 0 to 3. The proxy is the score of a reward model, in standard deviations of the SFT model's answers.

Claims: pairs of the policy's own answers are worth more than offline ones (Guo et al. 2024, arXiv
2402.04792), and RSO's more than others (Liu et al. 2023, arXiv 2309.06657). With a learned reward the proxy
rises while the true reward falls, and an ensemble delays that (Gao et al. 2022, arXiv 2210.10760; Coste et
al. 2023, arXiv 2310.02743). Best-of-n is the best of n answers of the SFT model by the judge.
"""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev

import train_reward
from dataset.jsonl import read_values
from errors import run_script
from eval import rounds
from eval.common import generating, load_model_and_tokenizer
from eval.experiments import common
from eval.experiments.common import answer_logratios, draw_curve, over_runs, shown, table, write_lines
from eval.judge import read_judged
from eval.report import BLUE, INK, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from eval.scorers import make_scorer
from eval.verdict import score
from files import write_json
from model.generate import generate
from training.distributed import World, pick_device
from training.settings import SAMPLE, flag, parse

OFFLINE = "offline pairs"
ARMS = {  # name: what scores the answers, how they are paired, colour
    "judge": ("judge", "best_worst", BLUE),
    "judge, RSO": ("judge", "rso", VIOLET),
    "reward model": ("one", "best_worst", ORANGE),
    "three reward models": ("three", "best_worst", INK),
}
COLUMNS = {  # figure: its column of the table, digits
    "points": ("true reward, 0 to 3", 2), "right": ("right", 3), "courteous": ("courteous", 3),
    "one": ("one reward model", 2), "three": ("three, mean − std", 2), "kl": ("KL(π ‖ π_ref), nats", 2),
    "tokens": ("tokens", 1),
}  # fmt: skip
BEST_OF = (1, 2, 4, 8)
REWARD_MODELS = 3


@dataclass
class Settings(common.DPOSettings):
    out: str = flag("runs/rounds-experiment", "folder for the runs, the figures and the picture")
    prompts: int = flag(300, "training prompts, from the start of the bundled pairs")
    held_out: int = flag(300, "held-out prompts, each answered once by every policy")
    rounds: int = flag(3, "rounds of each arm")
    samples: int = flag(8, "answers per prompt and round")
    reward_pairs: int = flag(300, "bundled pairs that each reward model is trained on")
    epochs: int = flag(2, "passes over the pairs of a round")
    lr: float = flag(2e-4, "peak learning rate of DPO")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    small = dict(prompts=6, held_out=4, rounds=2, samples=4, reward_pairs=8, epochs=1, batch_size=4)
    settings = common.shortened(settings, **small)
    need_matplotlib()
    out = Path(settings.out)
    runs = []
    for seed in range(settings.seeds):
        runs.append(Seed(settings, seed).run())
        write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, out / "rounds.png")
    print("\n" + summary(runs))


class Seed:
    """The runs of one seed. All start from one model and answer the same prompts."""

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed
        self.out = Path(settings.out) / f"seed-{seed}"
        self.world = World(0, 1, pick_device("auto"))
        self.start, self.tokenizer = load_model_and_tokenizer(settings.model, self.world.device)
        self.records = read_judged(str(SAMPLE / "heldout.jsonl"))[: settings.held_out]
        self.pairs = common.copy_lines(
            SAMPLE / "preferences.jsonl", self.out / "pairs.jsonl", settings.prompts
        )

    def run(self) -> dict:
        """For each arm its figures at the start and after each round; the offline arm has no rounds."""
        self.rewards = [str(self.reward_model(i)) for i in range(REWARD_MODELS)]
        before = self.measure(self.settings.model)
        found = {OFFLINE: [before, self.measure(self.offline())]}
        for arm, (scorer, method, _) in ARMS.items():
            found[arm] = [before, *self.rounds(arm, scorer, method)]
        scale = {name: (mean(before[name]), pstdev(before[name]) or 1.0) for name in ("one", "three")}
        for figures in {id(each): each for rows in found.values() for each in rows}.values():
            for name, (middle, spread) in scale.items():
                figures[name] = (mean(figures[name]) - middle) / spread
        return {"arms": found, "best of": self.best_of()}

    def reward_model(self, number: int) -> Path:
        """A reward model of other pairs than its neighbours."""
        rows = [record for _, record in read_values(SAMPLE / "preferences.jsonl")]
        count = self.settings.reward_pairs
        first = (self.seed * REWARD_MODELS + number) * count % len(rows)
        data = write_lines(self.out / f"reward-{number}.jsonl", (rows + rows)[first : first + count])
        flags = {"model": self.settings.model, "data": data, "epochs": 3}
        return common.train(self.out / f"reward-{number}", self.seed, train_reward.main, **flags)

    def offline(self) -> str:
        """DPO on the bundled pairs of the same prompts, with as many passes as all rounds."""
        settings = self.settings
        flags = {name: getattr(settings, name) for name in ("model", "batch_size", "lr", "beta")}
        passes = settings.epochs * settings.rounds
        return str(common.train(self.out / "offline", self.seed, data=self.pairs, epochs=passes, **flags))

    def rounds(self, arm: str, scorer: str, method: str) -> list[dict]:
        """The figures after each round. All arms share the first answers, which are those of SFT."""
        names = "model", "rounds", "samples", "epochs", "batch_size", "lr", "beta"
        how = {
            "one": {"reward": self.rewards[0]},
            "three": {"reward": ",".join(self.rewards), "pessimism": 1.0},
        }
        folder = self.out / arm.replace(", ", "-").replace(" ", "-")
        settings = rounds.Settings(
            **{name: getattr(self.settings, name) for name in names}, **how.get(scorer, {"scorer": scorer}),
            prompts=str(self.pairs), out=str(folder), method=method, max_new_tokens=64, seed=1000 * self.seed,
        )  # fmt: skip
        shared, own = self.out / "answers.jsonl", folder / "round-1" / "answers.jsonl"
        if shared.exists() and not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shared, own)
        rounds.require_same_settings(settings)
        figures, policy = [], self.settings.model
        for number in range(1, settings.rounds + 1):
            policy = rounds.next_policy(settings, policy, number, self.world)
            figures.append(self.measure(policy))
        shutil.copy(own, shared)
        for weights in folder.glob("round-*/dpo/model.pt"):
            weights.unlink()  # 16 MB each
        return figures

    def measure(self, folder: str) -> dict:
        """Figures of one answer to each held-out prompt, and all scores of the reward models."""
        policy, _ = load_model_and_tokenizer(folder, self.world.device)
        prompts, answers, texts = self.answers(policy, 1)
        verdicts = [
            score(*case) for case in zip(self.records, texts, (a.finished for a in answers), strict=True)
        ]
        asked = [
            {"prompt": [vars(turn) for turn in record["prompt"]], "answers": [{"text": text}]}
            for record, text in zip(self.records, texts, strict=True)
        ]
        one = make_scorer("", self.rewards[0], 0, self.world)(asked)
        three = make_scorer("", ",".join(self.rewards), 1.0, self.world)(asked)
        logratios = answer_logratios(policy, self.start, prompts, answers, self.tokenizer.end_id)
        return {
            "points": mean(verdict.points for verdict in verdicts),
            "right": mean(verdict.right for verdict in verdicts),
            "courteous": mean(verdict.manner for verdict in verdicts),
            "one": [value for (value,) in one],
            "three": [value for (value,) in three],
            "kl": logratios.mean().item(),
            "tokens": mean(len(answer.tokens) for answer in answers),
        }

    def answers(self, model, samples: int) -> tuple[list, list, list[str]]:
        """Prompts, `samples` answers to each held-out one, and their texts."""
        prompts = [self.tokenizer.prompt(record["prompt"]) for record in self.records]
        options = dict(max_new_tokens=64, seed=self.seed, batch_size=200, samples=samples)
        with generating(model):
            answers = generate(model, prompts, self.tokenizer.end_id, **options)
        return prompts, answers, [self.tokenizer.decode(answer.tokens) for answer in answers]

    def best_of(self) -> list[list[float]]:
        """The true reward and the bound of KL, log n − (n − 1) / n, of the best of n, for each n."""
        most = max(BEST_OF)
        _, answers, texts = self.answers(self.start, most)
        points = [score(self.records[i // most], texts[i], a.finished).points for i, a in enumerate(answers)]
        firsts = range(0, len(points), most)
        return [
            [math.log(n) - (n - 1) / n, mean(max(points[first : first + n]) for first in firsts)]
            for n in BEST_OF
        ]


# ---- Table and picture


def curves(runs: list[dict], arm: str, name: str) -> list[list[float]]:
    """For each seed the figure at the start and after each round."""
    return [[figures[name] for figures in run["arms"][arm]] for run in runs]


def summary(runs: list[dict]) -> str:
    """A table: each arm after each round, and best-of-n."""
    rows = []
    for arm in runs[0]["arms"]:
        for number in range(len(runs[0]["arms"][arm])):
            name = arm if arm == OFFLINE else f"{arm}, round {number}"
            values = {key: [run[number] for run in curves(runs, arm, key)] for key in COLUMNS}
            if number or not rows:
                cells = [shown(values[key], digits) for key, (_, digits) in COLUMNS.items()]
                rows.append([name if number else "SFT", *cells])
    for place, n in enumerate(BEST_OF[1:], start=1):
        kl, points = zip(*(run["best of"][place] for run in runs), strict=True)
        rows.append([f"best of {n}", shown(points), "", "", "", "", f"≤ {kl[0]:.2f}", ""])
    return table(["", *(title for title, _ in COLUMNS.values())], rows)


def draw(runs: list[dict], out: Path) -> None:
    """True and proxy reward by round; the true reward against KL."""
    with canvas(11, 3.9, out) as figure:
        true, proxy, frontier = figure.subplots(1, 3)
        plain(true, "True reward", "points of the judge, 0 to 3")
        plain(proxy, "Proxy reward", "one reward model, standard deviations of SFT")
        plain(frontier, "True reward against KL", "points of the judge, 0 to 3")
        for arm, (*_, colour) in ARMS.items():
            for axes, name in ((true, "points"), (proxy, "one")):
                values = curves(runs, arm, name)
                draw_curve(
                    axes, range(len(values[0])), values, colour, "", marker="o", markersize=4, label=arm
                )
            pair = (over(runs, arm, name) for name in ("kl", "points"))
            frontier.plot(*pair, color=colour, marker="o", markersize=4)
        for axes, name in ((true, "points"), (proxy, "one")):
            axes.axhline(over(runs, OFFLINE, name)[-1], color=PALE, linestyle="--", label=OFFLINE)
            axes.set_xlabel("round", color=PALE)
            axes.set_xticks(range(len(runs[0]["arms"][arm])))
        frontier.plot(over(runs, OFFLINE, "kl")[-1], over(runs, OFFLINE, "points")[-1], "s", color=PALE)
        best = [[over_runs(values).value for values in zip(*points, strict=True)]
                for points in zip(*(run["best of"] for run in runs), strict=True)]  # fmt: skip
        frontier.plot(*zip(*best, strict=True), color=PALE, linestyle=":", marker=".")
        for n, at in list(zip(BEST_OF, best, strict=True))[1:]:
            frontier.annotate(f"best of {n}", at, (0, 5), textcoords="offset points", size=8, color=PALE)
        frontier.set_xlabel("KL(π ‖ π_ref), nats per answer", color=PALE)
        handles, labels = true.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="lower center", ncols=5, labelcolor="linecolor")
        figure.subplots_adjust(left=0.05, right=0.98, top=0.84, bottom=0.22, wspace=0.22)


def over(runs: list[dict], arm: str, name: str) -> list[float]:
    """The mean over the seeds, at the start and after each round."""
    return [over_runs(values).value for values in zip(*curves(runs, arm, name), strict=True)]


if __name__ == "__main__":
    run_script(main)

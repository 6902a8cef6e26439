"""Preferences from prompts alone: a model answers, a scorer ranks the answers, DPO learns; and again.

    python -m eval.rounds --model runs/sft --prompts questions.txt --scorer rules.py:polite --out runs/rounds
    python -m eval.rounds --model runs/sft --prompts pairs.jsonl --reward runs/reward --rounds 3 --out DIR

A round is five commands with their defaults, and the flags below:

    eval.sample      answers of the policy                 OUT/round-1/answers.jsonl
    eval.score       a score for each                      OUT/round-1/scored.jsonl
    dataset.pair     the best against the worst            OUT/round-1/pairs.jsonl
    train_dpo.py     the next policy                       OUT/round-1/dpo
    eval.judge       its answers against the first model's OUT/round-1/judge.json

Each policy answers for itself, so its pairs show its present mistakes ("iterative" or "online" DPO: Xu et al.
2023, arXiv 2312.16682; Guo et al. 2024, arXiv 2402.04792). The same command continues a run that was stopped.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import train_dpo
from dataset.pair import METHODS, pair
from dataset.prompts import read_prompts
from errors import require, run_script
from eval import sample, score
from eval.common import load_model_and_tokenizer
from eval.judge import compare_scores, summary
from eval.scorers import ScorerFlags, make_scorer
from files import write_json
from model.weights import read_json
from training.distributed import World, join, pick_device
from training.run import RunFolder
from training.settings import DEVICE_WHY, DEVICES, PRECISIONS, flag, parse


@dataclass
class Settings(ScorerFlags):
    model: str = flag("runs/sft", "model folder to start from")
    prompts: str = flag("", "pairs, conversations or prompts alone (.jsonl, .json), or text lines (.txt)")
    eval_prompts: str = flag("", "prompts of the comparison after each round; empty: those of --prompts")
    out: str = flag("runs/rounds", "folder with a subfolder for each round")
    rounds: int = flag(3, "number of rounds")
    reference: str = flag(
        "last", "last: the model at the start of a round; first: --model", ("last", "first")
    )
    samples: int = flag(8, "answers per prompt")
    temperature: float = flag(1.0, "temperature of the answers")
    max_new_tokens: int = flag(256, "maximum tokens of an answer; a longer one is unfinished")
    method: str = flag("best_worst", "which answers to pair (dataset.pair)", METHODS[:-1])
    gap: float = flag(0.0, "a pair's scores differ by more than this")
    rso_beta: float = flag(0.5, "rso: smaller accepts higher scores only")
    loss: str = flag("sigmoid", "loss of train_dpo.py; soft and others use the scores of the pairs")
    beta: float = flag(0.1, "KL strength of train_dpo.py")
    lr: float = flag(2e-4, "peak learning rate of train_dpo.py")
    epochs: int = flag(1, "passes over the pairs of a round")
    batch_size: int = flag(16, "pairs per optimizer step")
    seed: int = flag(0, "seed of sampling and training; each round adds its number")
    device: str = flag("auto", DEVICE_WHY, DEVICES)
    precision: str = flag("auto", "of the training, as in train_dpo.py", PRECISIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompts, "give --prompts, the file of prompts")
        require(self.scorer or self.reward, "give --scorer or --reward, which ranks the answers")
        self.at_least(1, "rounds", "samples")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        world.from_main(lambda: require_same_settings(settings))
        policy = settings.model
        for number in range(1, settings.rounds + 1):
            world.print(f"\nround {number} of {settings.rounds}: {policy} answers")
            policy = next_policy(settings, policy, number, world)
            judged = Path(policy).parent / "judge.json"
            once(judged, world, lambda: world.from_main(lambda: judge(settings, policy, judged)))  # noqa: B023
            world.print(summary(read_json(judged)))


def require_same_settings(settings: Settings) -> None:
    """Write the settings to --out. Raises `InputError` if its rounds have others, except for their number."""
    path, now = Path(settings.out) / "config.json", {"settings": asdict(settings)}
    then = read_json(path)["settings"] if path.is_file() else asdict(settings)
    other = [
        name for name in then if then[name] != now["settings"][name] and name not in ("rounds", "device")
    ]
    require(not other, f"{settings.out} has rounds with another --{', --'.join(other)}: give another --out")
    write_json(path, now)


def next_policy(settings: Settings, policy: str, number: int, world: World) -> str:
    """Sample, score, pair and train; return the folder of the next policy. Finished parts stay."""
    folder, seed = Path(settings.out) / f"round-{number}", settings.seed + number
    answers, scored, pairs = (folder / f"{name}.jsonl" for name in ("answers", "scored", "pairs"))
    once(answers, world, lambda: sample.sample(sampling(settings, policy, answers, seed), world))
    once(scored, world, lambda: score.score(scoring(settings, answers, scored), world))
    once(pairs, world, lambda: world.from_main(lambda: pair(pairing(settings, scored, pairs, seed))))
    dpo = training(settings, policy, pairs, folder / "dpo", seed)
    with RunFolder(dpo, world) as run:
        train_dpo.train(dpo, world, run)
    return dpo.out


def once(file: Path, world: World, work: Callable[[], None]) -> None:
    """Call `work`, which writes the file, unless the file is there."""
    if not world.from_main(file.exists):
        work()


# ---- The settings of each part


def chosen(settings: Settings, *names: str) -> dict:
    return {name: getattr(settings, name) for name in names}


def sampling(settings: Settings, policy: str, out: Path, seed: int) -> sample.Settings:
    same = chosen(settings, "samples", "temperature", "max_new_tokens", "device")
    return sample.Settings(model=policy, data=settings.prompts, out=str(out), seed=seed, **same)


def scoring(settings: Settings, answers: Path, out: Path) -> score.Settings:
    same = chosen(settings, "scorer", "pessimism", "device")
    return score.Settings(model=settings.reward, data=str(answers), out=str(out), **same)


def pairing(settings: Settings, scored: Path, out: Path, seed: int) -> Namespace:
    accept = max(2, settings.samples // 2)
    same = chosen(settings, "method", "gap")
    return Namespace(
        file=scored, out=out, beta=settings.rso_beta, accept=accept, max_tokens=0, seed=seed, **same
    )


def training(settings: Settings, policy: str, pairs: Path, out: Path, seed: int) -> train_dpo.Settings:
    same = chosen(settings, "loss", "beta", "lr", "epochs", "batch_size", "device", "precision")
    other = settings.model if settings.reference == "first" and policy != settings.model else ""
    files = {"model": policy, "reference_model": other, "data": str(pairs), "eval_data": "", "out": str(out)}
    return train_dpo.Settings(**files, **same, seed=seed, resume=True)


def judge(settings: Settings, policy: str, out: Path) -> None:
    """Compare answers of the policy and of --model, by the same scorer; write the figures."""
    device = pick_device(settings.device)
    scorer = make_scorer(settings.scorer, settings.reward, settings.pessimism, World(0, 1, device))
    models = {
        name: load_model_and_tokenizer(folder, device)
        for name, folder in (("policy", policy), ("start", settings.model))
    }
    records = read_prompts(settings.eval_prompts or settings.prompts)
    same = chosen(settings, "temperature", "max_new_tokens", "seed")
    write_json(out, compare_scores(models, records, scorer, samples=2, batch_size=64, **same))


if __name__ == "__main__":
    run_script(main)

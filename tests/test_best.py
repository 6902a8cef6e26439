"""--keep-best and several held-out sets: which weights are kept, and what is left of them after a kill."""

import json

import pytest
import torch

import train_dpo
from errors import InputError
from tests.faults import train
from tests.loops import metrics
from tests.ranks import forked
from tests.runs import ALONE, PAIRS, run_flags, same_model, stopped
from training import folder as run_folder
from training.checkpoint import checkpoints, load_checkpoint, step_of

LOSS, ACCURACY = "eval_loss", "eval_rewards/accuracies"


@pytest.fixture
def flags(tmp_path, tokenizer):
    """Flags of six steps, each evaluated on five pairs of which two have their sides exchanged.

    The loss on them falls at first and then rises, and so does the accuracy the other way round.
    """
    mixed = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS[:2]]
    text = "".join(f"{json.dumps(row)}\n" for row in [*mixed, *PAIRS[2:5]])
    (tmp_path / "mixed").write_text(text)
    made = run_flags(
        tmp_path, tokenizer, eval_data=tmp_path / "mixed", epochs=2, lr=1e-2, warmup_steps=0, log_every=1,
        eval_every=1, sample_prompts=0, save_every=1, keep_checkpoints=100,
    )  # fmt: skip
    return lambda out="run", **changes: made(tmp_path / out, **changes)


def best_of(folder) -> dict:
    return json.loads((folder / "best" / "config.json").read_text())["best"]


def values(folder, metric) -> dict[int, float]:
    return {row["step"]: row[metric] for row in metrics(folder) if metric in row}


@pytest.mark.parametrize("metric, options", [
    (LOSS, {}), (ACCURACY, {}), (LOSS, {"lora_rank": 2}),
])  # fmt: skip
def test_the_best_weights_are_those_of_the_step_with_the_best_figure(metric, options, flags, tmp_path):
    """Oracle: the checkpoints of all steps, and the log."""
    train(train_dpo, flags(keep_best=metric, **options), ALONE)
    run, found = tmp_path / "run", values(tmp_path / "run", metric)
    assert len(set(found.values())) > 1
    step = min(found, key=found.get) if metric == LOSS else max(found, key=found.get)
    assert best_of(run) == {"metric": metric, "value": found[step], "step": step}
    assert json.loads((run / "config.json").read_text())["best"] == best_of(run)
    (checkpoint,) = [path for path in checkpoints(run / "checkpoints") if step_of(path) == step]
    saved = load_checkpoint(checkpoint)["model"]
    kept = run_folder.BEST, "adapter.pt" if options else "model.pt"
    kept = torch.load(run.joinpath(*kept), weights_only=True)
    assert saved.keys() == kept.keys() and all(saved[name].equal(kept[name]) for name in saved)


def test_a_kill_leaves_the_best_and_a_resumed_run_ends_with_the_same(flags, tmp_path):
    """The run ends after step 5 and continues from step 4: the best is kept, and is that of a whole run."""
    train_dpo.main(flags("whole", keep_best=ACCURACY))
    best = best_of(tmp_path / "whole")
    stopped(train_dpo, flags(keep_best=ACCURACY, save_every=4), after=5)
    found = values(tmp_path / "run", ACCURACY)
    assert best_of(tmp_path / "run")["step"] == max(found, key=found.get)
    (tmp_path / "run" / "best").rename(tmp_path / "run" / "best.old")  # killed between the two renames
    (tmp_path / "run" / "best.tmp").mkdir()
    with pytest.raises(InputError, match="continue it with --resume"):
        train_dpo.main(flags(keep_best=ACCURACY))
    train_dpo.main(flags(keep_best=ACCURACY, save_every=4, resume=True))
    assert best_of(tmp_path / "run") == best
    assert same_model(tmp_path / "run" / "best", tmp_path / "whole" / "best")
    assert same_model(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob("best.*"))
    train_dpo.main(flags(overwrite=True, eval_data="", max_steps=1))
    assert not (tmp_path / "run" / "best").exists()


def test_the_best_of_a_run_without_a_checkpoint_is_not_removed(flags, tmp_path):
    stopped(train_dpo, flags(keep_best=ACCURACY, save_every=0), after=2)
    with pytest.raises(InputError, match="the best weights of a stopped run"):
        train_dpo.main(flags(keep_best=ACCURACY))
    (tmp_path / "run" / "best" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"a run did not write .*notes.txt"):
        train_dpo.main(flags(keep_best=ACCURACY, overwrite=True))


@pytest.mark.parametrize("changes, message", [
    ({"keep_best": "eval_accuracy"}, "not a held-out metric; choose from eval_loss, "),
    ({"keep_best": "loss"}, "must be a metric that begins with eval_"),
    ({"keep_best": LOSS, "eval_data": ""}, "needs --eval-data or --eval-share"),
])  # fmt: skip
def test_a_figure_that_does_not_exist_is_refused(changes, message, flags):
    with pytest.raises(InputError, match=message):
        train_dpo.main(flags(**changes))


def test_every_held_out_set_has_rows_of_its_own(flags, tmp_path):
    """Oracle: runs with one set each. The best may be chosen by either."""
    files = {"a": tmp_path / "mixed", "b": tmp_path / "pairs"}
    several = [f"{name}={path}" for name, path in files.items()]
    train_dpo.main([*flags(keep_best="eval_b_loss"), "--eval-data", *several])
    rows = metrics(tmp_path / "run")
    for name, path in files.items():
        train_dpo.main(flags(name, eval_data=path))
        alone = [row for row in metrics(tmp_path / name) if LOSS in row]
        named = [{k.replace("eval_", f"eval_{name}_"): v for k, v in row.items()} for row in alone]
        assert named == [row for row in rows if f"eval_{name}_loss" in row]
    found = values(tmp_path / "run", "eval_b_loss")
    assert best_of(tmp_path / "run")["step"] == min(found, key=found.get)
    for twice in (["a=x", "a=y"], ["x", "y"]):
        with pytest.raises(InputError, match=r"--eval-data .*: a held-out set"):
            train_dpo.main([*flags("other"), "--eval-data", *twice])


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_keep_the_same_best(shard, flags, tmp_path):
    """Ranks that hold parts of the weights go on with their parts."""
    train_dpo.main(flags("alone", keep_best=LOSS))
    split = {"shard": True} if shard else {}
    result = forked("train_dpo", *flags(keep_best=LOSS, micro_batch_tokens=130, **split), ranks=2)
    assert result.returncode == 0, result.stderr
    assert best_of(tmp_path / "run")["step"] == best_of(tmp_path / "alone")["step"]
    for part in ("", "best"):
        one, other = (torch.load(tmp_path / run / part / "model.pt") for run in ("run", "alone"))
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)

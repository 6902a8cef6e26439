"""Trackers: what their own files contain, read back; and a resumed run, which continues there."""

import json
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import train_dpo
from errors import InputError
from tests.loops import metrics
from tests.ranks import forked
from tests.runs import run_flags, stopped
from training import track
from training.checkpoint import checkpoints


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


@pytest.fixture
def flags(tmp_path, tokenizer):
    """Six steps, a row for each, evaluations at 0, 3 and 6, and a checkpoint of each step."""
    made = run_flags(
        tmp_path, tokenizer, eval_data=True, epochs=2, warmup_steps=2, log_every=1, eval_every=3,
        sample_prompts=0, save_every=1, keep_checkpoints=9,
    )  # fmt: skip
    return lambda **changes: made(tmp_path / "run", **changes)


def wanted(folder: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}} of metrics.jsonl under the names of Hugging Face's Trainer."""
    found = {}
    for row in metrics(folder):
        step = row.pop("step")
        for name, value in row.items():
            name = "eval/" + name[5:] if name.startswith("eval_") else "train/" + name
            found.setdefault(name, {})[step] = value
    assert {"train/loss", "eval/rewards/margins", "train/grad_norm"} <= found.keys()
    return found


def log_records(path: Path) -> list[bytes]:
    """The records of a file in LevelDB's log format, in which wandb and swanlab write, after their header."""
    data, place, records, whole = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # The rest of a block is padding.
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(whole)
            whole = b""
    return records


# ---- TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_same_events(folder: Path) -> None:
    """TensorBoard shows each row once, to the precision of float32."""
    found = events(folder)
    expected = wanted(folder)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == list(values), name
        assert [value for _, value in found[name]] == pytest.approx([*values.values()], rel=1e-6), name


@needs("tensorboard")
def test_tensorboard_reads_back_the_rows(flags, tmp_path):
    folder = tmp_path / "run"
    train_dpo.main(flags(track="tensorboard"))
    assert_same_events(folder)
    assert not (folder / "tracker.json").exists()


@needs("tensorboard")
def test_tensorboard_shows_a_resumed_run_once(flags, tmp_path):
    """The stopped run wrote steps 4 and 5 after the checkpoint that the resumed run continues from."""
    folder, arguments = tmp_path / "run", flags(track="tensorboard")
    stopped(train_dpo, arguments, after=5)
    for newest in checkpoints(folder / "checkpoints")[:2]:
        newest.unlink()
    assert [step for step, _ in events(folder)["train/loss"]] == [1, 2, 3, 4, 5]
    train_dpo.main([*arguments, "--resume"])
    assert_same_events(folder)


@needs("tensorboard")
def test_a_replaced_run_leaves_no_curves(flags, tmp_path):
    """They would be drawn as those of the new run; files of others in that folder stay."""
    once = flags(max_steps=1, overwrite=True)
    train_dpo.main([*once, "--track", "tensorboard"])
    (tmp_path / "run" / "tensorboard" / "notes.txt").write_text("mine")
    train_dpo.main(once)
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["notes.txt"]


@needs("tensorboard")
def test_one_rank_tracks(flags, tmp_path):
    result = forked("train_dpo", *flags(track="tensorboard"), ranks=2)
    assert result.returncode == 0, result.stderr
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1
    assert_same_events(tmp_path / "run")


# ---- Weights & Biases and SwanLab, offline


def wandb_rows(path: Path) -> dict[str, dict[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for record in map(Record.FromString, log_records(path)):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = items.pop("train/global_step", None)
        for name, value in items.items():
            if not name.startswith("_"):
                found.setdefault(name, {})[step] = value
    return found


def swanlab_rows(path: Path) -> dict[str, dict[int, float]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found = {}
    for record in map(Record.FromString, log_records(path)):
        if record.HasField("scalar"):
            found.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
    return found


@pytest.mark.parametrize(
    "name, pattern, read",
    [
        pytest.param("wandb", "wandb/offline-run-*/*.wandb", wandb_rows, marks=needs("wandb")),
        pytest.param("swanlab", "swanlab/run-*/*.swanlab", swanlab_rows, marks=needs("swanlab")),
    ],
)
def test_an_offline_tracker_keeps_the_rows_and_the_run(name, pattern, read, flags, tmp_path, monkeypatch):
    """All rows of the file, and after a resume a second part with the same id that continues the first."""
    monkeypatch.setenv(f"{name.upper()}_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, arguments = tmp_path / "run", flags(track=name)
    stopped(train_dpo, arguments, after=5)
    if name == "wandb":
        sys.modules["wandb"].finish()
    else:
        sys.modules["swanlab"].finish()
    for newest in checkpoints(folder / "checkpoints")[:2]:
        newest.unlink()
    (first,) = folder.glob(pattern)
    assert [*read(first)["train/loss"]] == [1, 2, 3, 4, 5]
    train_dpo.main([*arguments, "--resume"])
    (second,) = {*folder.glob(pattern)} - {first}
    found, expected = read(second), wanted(folder)
    assert [*found["train/loss"]] == [4, 5, 6]
    for part in (first, second):
        assert json.loads((folder / "tracker.json").read_text())["id"] in str(part)
        for key, values in read(part).items():
            speed = key.endswith("_per_second")  # No two runs share it.
            assert speed or values == pytest.approx({step: expected[key][step] for step in values}), key
    assert found.keys() == expected.keys()


# ---- Without a tracker, or without its package


def test_a_run_without_a_tracker_imports_none(flags, tmp_path, monkeypatch):
    """An import takes seconds, and its failure would end a run that does not need it."""
    for name in ("tensorboard", "wandb", "swanlab", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    train_dpo.main(flags())
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_a_missing_package_is_named_before_anything_is_loaded(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--track wandb needs the package wandb: pip install wandb"):
        train_dpo.main(flags(track="wandb", model="nowhere"))


def test_a_tracker_that_cannot_start_is_one_line(flags, tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *arguments):
            raise RuntimeError("no login\nTraceback …")

    monkeypatch.setattr(track, "find_spec", lambda name: True)
    monkeypatch.setattr(track, "WeightsAndBiases", Broken)
    with pytest.raises(InputError, match=r"--track wandb: it cannot start \(no login\)"):
        train_dpo.main(flags(track="wandb"))

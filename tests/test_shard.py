"""--shard: weights, gradients and moments split among ranks; the same model, saved and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.tensor import Shard, distribute_tensor

import model.transformer
import train_dpo
import train_reward
import train_sft
from errors import InputError
from files import file_hash
from tests.conftest import save_adapter, save_folder
from tests.faults import digest, timeless, train
from tests.loops import ROOT, metrics, torchrun, weights
from tests.ranks import forked, free_port
from tests.runs import ALONE, run_flags, same_model
from tests.test_faults import faulty
from tests.test_weights import Evil
from training.checkpoint import checkpoints, load_checkpoint, newest_valid, remove, save_checkpoint, step_of
from training.distributed import World
from training.sharded import METADATA, STATE, Reader, place_tensors

SCRIPTS = {"train_dpo": train_dpo, "train_reward": train_reward, "train_sft": train_sft}


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer):
    """Flags of a short, uneven run: windows of 3 over 2 ranks, one by one; in the last a rank has none."""
    folder = tmp_path_factory.mktemp("shard")
    save_folder(folder / "untied", tokenizer, tie_word_embeddings=False)
    save_folder(folder / "experts", tokenizer, num_experts=3)
    save_adapter(folder / "adapter", tokenizer)
    made = run_flags(
        folder, tokenizer, eval_data=True, batch_size=3, micro_batch_tokens=1, epochs=1, warmup_steps=2,
        log_every=1, eval_every=2,
    )  # fmt: skip

    def of(out, script="train_dpo", start="start", **changes) -> list[str]:
        if script == "train_sft":
            changes = {"data": "chats", "tokenizer": folder / "start" / "tokenizer.json", **changes}
        if "adapter" in changes:
            changes["adapter"] = folder / changes["adapter"]
        return made(out, **{"model": folder / start, **changes})

    return of


# ---- the same training


CASES = {
    "dpo": ("train_dpo", {}),
    "sft": ("train_sft", {}),
    "fresh": ("train_sft", {"model": "tiny", "optimizer": "adamw"}),
    "reward": ("train_reward", {}),
    "untied-again-in-backward": ("train_dpo", {"start": "untied", "checkpoint_activations": True}),
    "vocabulary-in-chunks-wpo": ("train_dpo", {"wpo": True, "micro_batch_tokens": 150}),
    "experts": ("train_dpo", {"start": "experts"}),
    "adapters": ("train_dpo", {"lora_rank": 2}),
    "adapter-in": ("train_dpo", {"adapter": "adapter"}),
    "moving-reference": ("train_dpo", {"tr_alpha": 0.3, "loss": "sigmoid,bco_pair"}),
    "cached-reference": ("train_dpo", {"reference": "cached"}),
    "bf16": ("train_dpo", {"precision": "bf16"}),
    "fp16": ("train_dpo", {"precision": "fp16"}),
}
LOGITS = {"vocabulary-in-chunks-wpo": 2000}  # six positions of 320 tokens at once, of up to thirty


@pytest.fixture(scope="module")
def together(request, flags, tmp_path_factory):
    """The cases that this run of pytest has collected, on two ranks, with copies and split."""
    folder = tmp_path_factory.mktemp("together")
    items = [item for item in request.session.items if item.module is request.module]
    specs = [item.callspec.params if hasattr(item, "callspec") else {} for item in items]
    jobs = []
    for case in {params.get("case", "dpo") for params in specs}:
        script, changes = CASES[case]
        for kind, split in (("copies", {}), ("split", {"shard": True})):
            out = folder / f"{case}-{kind}"
            job = {"script": script, "arguments": flags(out, script, **changes, **split), "held": str(out)}
            jobs.append({**job, "logits": LOGITS.get(case, 2**25)})
    (folder / "jobs").write_text(json.dumps(jobs))
    result = forked("tests.shards", folder / "jobs", ranks=2, seconds=240)
    assert result.returncode == 0, result.stderr
    return folder


def furthest(folder, other) -> dict[str, float]:
    """The largest difference between two runs' losses, their gradient norms (relative), and their weights."""
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    rows, others = metrics(folder), metrics(other)
    assert len(rows) == len(others) >= 4

    def logged(*names):
        return [(row[n], same[n]) for row, same in zip(rows, others, strict=True) for n in names if n in row]

    return {
        "loss": max(abs(a - b) for a, b in logged("loss", "eval_loss", "aux_loss")),
        "grad_norm": max(abs(a / b - 1) for a, b in logged("grad_norm")),
        "weights": max((one[name] - two[name]).abs().max().item() for name in one),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_split_model_trains_like_copies_and_like_one_process(case, together, flags, tmp_path, monkeypatch):
    """A gradient that is summed and not averaged, or exchanged too often or too seldom, is one step away."""
    script, changes = CASES[case]
    monkeypatch.setattr(model.transformer, "MAX_LOGITS", LOGITS.get(case, 2**25))
    train(SCRIPTS[script], flags(tmp_path, script, **changes), ALONE)
    split = together / f"{case}-split"
    for other in (together / f"{case}-copies", tmp_path):
        found = furthest(split, other)
        assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_its_part_alone(rank, together):
    """Were nothing split, all of the above would hold, and memory would be as full as ever."""
    files = [together / f"dpo-{kind}-{rank}.json" for kind in ("copies", "split")]
    copies, split = (json.loads(file.read_text()) for file in files)
    whole = sum(value.nbytes for value in weights(together / "dpo-split").values())
    assert copies["policy"] == copies["gradients"] == whole and copies["moments"] == 2 * whole
    for name in ("policy", "reference", "gradients", "moments"):
        share = split[name] / (2 * whole if name == "moments" else whole)
        assert 0.45 < share < 0.55, name


@pytest.mark.parametrize("case", ["dpo", "sft", "fresh", "reward", "experts", "adapters", "cached-reference"])
def test_one_rank_alone_loads_the_model(case, together):
    """The others hold at most the parts that they keep, a weight on its way, and the one before it."""
    files = [together / f"{case}-split-{rank}.json" for rank in (0, 1)]
    main, other = (json.loads(file.read_text()) for file in files)
    sizes = sorted(value.nbytes for value in weights(together / f"{case}-split").values())
    assert main["loading"] > sum(sizes), "what is counted would not show on the rank that loads it, either"
    assert other["loading"] <= 1.05 * sum(sizes[-2:]) + other["policy"] + other["reference"]


def test_alone_there_is_nothing_to_split(flags, tmp_path):
    """One process with --shard is the run without, to the bit."""
    for name, split in (("plain", {}), ("split", {"shard": True})):
        train(train_dpo, flags(tmp_path / name, save_every=2, **split), ALONE)
    assert same_model(tmp_path / "plain", tmp_path / "split")
    assert [path.suffix for path in checkpoints(tmp_path / "split" / "checkpoints")] == [".pt", ".pt"]


# ---- saved and resumed


@pytest.fixture(scope="module")
def saved(flags, tmp_path_factory):
    """A split run on two ranks with a checkpoint of each step; and it again, resumed from each of them."""
    folder = tmp_path_factory.mktemp("saved")
    arguments = flags("", shard=True)[2:]
    command = ["tests.faults", "resume", "train_dpo", folder / "verdict", folder, *arguments]
    result = forked(*command, ranks=2, seconds=200)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_split_run_resumed_at_any_step_changes_no_bit(saved):
    """Weights, moments, running means of both ranks, rows and the final model."""
    assert json.loads((saved / "verdict").read_text()) == {str(step): [] for step in range(1, 5)}
    assert [path.suffix for path in checkpoints(saved / "whole" / "checkpoints")] == [".shards"] * 4


def copied(whole, folder, step=2):
    """The folder of a run that was stopped after so many steps, as a copy of one that was not."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    (folder / "model.pt").unlink()
    for path in checkpoints(folder / "checkpoints"):
        if step_of(path) > step:
            remove(path)
    return folder


def test_saved_on_two_ranks_resumed_on_one(saved, flags, tmp_path):
    """A part that is put back in the wrong place, or left as it was, is another model."""
    folder = copied(saved / "whole", tmp_path)
    with pytest.raises(InputError, match="was started with ranks 2, now 1"):
        train(train_dpo, flags(folder, shard=True, resume=True), ALONE)
    train(train_dpo, flags(folder, shard=True, resume=True, override="ranks"), ALONE)
    found = furthest(folder, saved / "whole")
    assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
def test_from_copies_to_parts_and_back(saved, flags, tmp_path):
    """Any checkpoint can be gone on with on any number of ranks, split or not, if that is said."""
    train(train_dpo, flags(tmp_path / "alone", save_every=1, keep_checkpoints=9), ALONE)
    copied(tmp_path / "alone", tmp_path / "from-alone")
    copied(saved / "whole", tmp_path / "from-split")
    jobs = []
    hows = {"from-alone": {"shard": True, "override": "ranks,shard"}, "from-split": {"override": "shard"}}
    for name, how in hows.items():
        arguments = flags(tmp_path / name, resume=True, **how)
        jobs.append({"script": "train_dpo", "held": str(tmp_path / name), "arguments": arguments})
    (tmp_path / "jobs").write_text(json.dumps(jobs))
    result = forked("tests.shards", tmp_path / "jobs", ranks=2, seconds=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("continuing after step 2") == 2
    for name in hows:
        found = furthest(tmp_path / name, saved / "whole")
        assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_to_the_same_bits(saved, flags, tmp_path):
    """kill -9 amid a step, and torchrun starts both ranks anew."""
    arguments = flags(tmp_path, shard=True, save_every=1, keep_checkpoints=1000, resume=True)
    result = torchrun(2, "-m", *faulty("SIGKILL", 1, 2), *arguments, restarts=1)
    assert result.returncode == 0, result.stderr
    assert "continuing after step 2" in result.stdout
    assert same_model(tmp_path, saved / "whole")
    assert timeless(metrics(tmp_path)) == timeless(metrics(saved / "whole"))


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_the_parts_of_all(saved, flags, tmp_path):
    result = torchrun(2, "-m", *faulty("SIGTERM", 1, 2), *flags(tmp_path, shard=True, save_every=0))
    assert result.returncode != 0
    assert "SIGTERM: saved after step 3; continue with --resume" in result.stdout
    (found,) = checkpoints(tmp_path / "checkpoints")
    (wanted,) = (p for p in checkpoints(saved / "whole" / "checkpoints") if step_of(p) == 3)
    assert digest(load_checkpoint(found)) == digest(load_checkpoint(wanted))


@pytest.mark.slow
def test_a_number_that_is_not_finite_on_one_rank_stops_both(flags, tmp_path):
    result = forked(*faulty("loss nan", 1, 2), *flags(tmp_path, shard=True, save_every=1), ranks=2)
    assert result.returncode != 0
    assert "error: step 2: " in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert step_of(checkpoints(tmp_path / "checkpoints")[0]) == 1


# ---- checkpoints: whole or not there, trusted or refused. One rank in this process is enough for that.


@pytest.fixture
def world(tmp_path):
    """A process group of one rank, whose tensors are split in one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield ALONE
    finally:
        dist.destroy_process_group()


def state_of(step: int, world: World) -> dict:
    torch.manual_seed(step)
    parts = {name: distribute_tensor(torch.randn(7, 5), world.mesh, [Shard(0)]) for name in "ab"}
    moments = {"state": {0: {"step": torch.tensor(3.0)}}}
    return {"step": step, "model": parts, "optimizer": moments, "lr": step / 7}


@pytest.fixture
def folder(tmp_path, world):
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, state_of(step, world), 2, world)
    return tmp_path / "checkpoints"


def newest(folder, world) -> tuple[int | None, list[str]]:
    """The step that a resumed run would go on from, its state checked to the bit; and what is said."""
    said: list[str] = []
    path, state = newest_valid(folder, said.append)
    wanted = state_of(state["step"], world)
    for mesh in (None, world.mesh):
        found = place_tensors(state, path, mesh)
        assert found["lr"] == wanted["lr"] and found["optimizer"] == wanted["optimizer"]
        for name, value in wanted["model"].items():
            part = found["model"][name]
            assert torch.equal(part.full_tensor() if mesh else part, value.full_tensor())
    return step_of(path), said


def test_what_is_saved_is_what_is_loaded(folder, world):
    assert newest(folder, world) == (2, [])
    save_checkpoint(folder, 3, state_of(3, world), 2, world)
    assert [step_of(path) for path in checkpoints(folder)] == [3, 2]
    assert len(list(folder.iterdir())) == 2
    assert {path.name for path in checkpoints(folder)[0].iterdir()} == {STATE, METADATA, "__0_0.distcp"}


@pytest.mark.parametrize("name", [STATE, METADATA, "__0_0.distcp"])
def test_damage_in_any_file_is_found_and_an_older_checkpoint_used(name, folder, world):
    """Flipped bits, a file cut short, a file that is gone: the whole checkpoint is out of the way then."""
    path = checkpoints(folder)[0] / name
    data, draw = path.read_bytes(), random.Random(0)
    for bit in draw.sample(range(8 * len(data)), 50):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(path.parent)
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path.parent)
    path.unlink()
    step, said = newest(folder, world)
    assert step == 1 and len(said) == 1 and "cannot be read" in said[0] and "going back to step 1" in said[0]
    assert [step_of(each) for each in checkpoints(folder)] == [1]


def forged(path, name: str, write) -> None:
    """Another file in a checkpoint, with all digests set right, as somebody would who forges it."""
    write(path / name)
    state = torch.load(path / STATE, weights_only=True)
    state["files"][name] = file_hash(path / name)
    torch.save(state, path / STATE)
    path.rename(path.with_name(f"{path.name[:8]}-{file_hash(path / STATE)}.shards"))


def with_bytes_for_a_tensor(path):
    """Metadata that say of a tensor that it is bytes, which DCP unpickles."""
    found = Reader(path.parent).read_metadata()
    found.state_dict_metadata["/model/a"] = BytesStorageMetadata()
    torch.save(found, path)


def elsewhere(path):
    """Metadata that send the reader to a file outside."""
    found = Reader(path.parent).read_metadata()
    for part in found.storage_data.values():
        part.relative_path = "../outside"
    torch.save(found, path)


RAW = b"cos\nsystem\n(S'touch PWNED'\ntR."  # a pickle by hand, as DCP's .metadata is one


@pytest.mark.parametrize("write, reason", [
    pytest.param(lambda path: torch.save(Evil(), path), "not a checkpoint", id="evil"),
    pytest.param(lambda path: path.write_bytes(RAW), "not a checkpoint", id="raw"),
    pytest.param(with_bytes_for_a_tensor, "not a checkpoint", id="bytes"),
    pytest.param(elsewhere, "outside is not a file of this checkpoint", id="elsewhere"),
])  # fmt: skip
def test_hostile_metadata_run_nothing(write, reason, folder, world, tmp_path, monkeypatch):
    """DCP's own reader unpickles its metadata, and what they call bytes."""
    monkeypatch.chdir(tmp_path)
    forged(checkpoints(folder)[0], METADATA, write)
    step, said = newest(folder, world)
    assert step == 1 and reason in said[0]
    assert not (tmp_path / "PWNED").exists()


def test_hostile_parts_run_nothing(folder, world, tmp_path, monkeypatch):
    """Neither does what stands where a tensor's part should."""
    monkeypatch.chdir(tmp_path)
    forged(checkpoints(folder)[0], "__0_0.distcp", lambda path: torch.save({"a": Evil()}, path))
    path, state = newest_valid(folder, print)
    with pytest.raises(InputError, match="not a checkpoint"):
        place_tensors(state, path, None)
    assert not (tmp_path / "PWNED").exists()


def test_links_are_no_checkpoints(folder, world, tmp_path):
    """Neither the folder nor a file of it may stand elsewhere."""
    path = checkpoints(folder)[0] / "__0_0.distcp"
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="is not a file of this checkpoint"):
        load_checkpoint(path.parent)
    path.parent.rename(tmp_path / path.parent.name)
    path.parent.symlink_to(tmp_path / path.parent.name)
    step, said = newest(folder, world)
    assert step == 1 and "a link" in said[0]


class Killed(BaseException):
    """The process ends here: nothing after it is done, nothing is tidied up."""


class Watched:
    """Notes what makes files durable, in its order; and is killed, or fails, at one of these calls."""

    def __init__(self, patch, at: int | None = None, error: BaseException | None = None):
        self.log: list[tuple[str, str]] = []
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            patch.setattr(module, name, self.watching(name, getattr(module, name), at, error))

    def watching(self, name, function, at, error):
        def called(first, *arguments, **options):
            where = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
            self.log.append((name, where.rpartition("/")[2]))
            tidying = name == "rmtree" and options.get("ignore_errors")
            if at is not None and len(self.log) > at and not tidying:
                raise error
            return function(first, *arguments, **options)

        return called


def test_all_is_on_the_disk_before_the_folder_is_renamed(folder, world, monkeypatch):
    """A power cut must not leave a name without what belongs to it."""
    with monkeypatch.context() as patch:
        watched = Watched(patch)
        save_checkpoint(folder, 3, state_of(3, world), 2, world)
    unfinished = "00000003-{sha256}.shards.tmp"
    renamed = watched.log.index(("replace", unfinished))
    before = watched.log[:renamed]
    written = "__0_0.distcp", f"{METADATA}.{os.getpid()}.tmp", f"{STATE}.{os.getpid()}.tmp"
    assert {("fsync", name) for name in written} <= {*before}
    assert before[-1] == ("fsync", unfinished), "the names within it, too"
    assert watched.log[renamed + 1] == ("fsync", "checkpoints")
    assert [what for what, _ in watched.log[renamed + 2 :]] == ["rename", "rmtree"], "what is old goes last"


@pytest.mark.parametrize("error", [Killed(), OSError(28, os.strerror(28))], ids=["killed", "full"])
def test_an_end_at_any_moment_leaves_a_whole_checkpoint(error, folder, world, tmp_path, monkeypatch):
    """At every sync and rename: by a kill, by a full disk, which is reported in one line."""
    for at in range(100):
        copy = shutil.copytree(folder, tmp_path / str(at) / "checkpoints")
        with monkeypatch.context() as patch:
            watched = Watched(patch, at, error)
            try:
                save_checkpoint(copy, 3, state_of(3, world), 2, world)
            except (Killed, dcp.CheckpointException):
                assert isinstance(error, Killed)
            except InputError as failure:
                if "cannot be removed (No space left on device)" in str(failure):  # The new one is safe.
                    assert watched.log[-1][0] in ("rename", "rmtree")
                else:
                    assert "cannot be written (No space left on device); earlier files are" in str(failure)
                    assert not list(copy.glob("*.tmp"))
        step, said = newest(copy, world)
        assert step in (2, 3) and not said
        if len(watched.log) <= at:
            break
    assert at >= 7 and step == 3


# ---- several nodes


def test_two_nodes_train_like_one(together, flags, tmp_path):
    """Two agents of torchrun that find each other by a rendezvous, one rank each: the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=test"]
    command += ["--local-addr=localhost", "train_dpo.py", *flags(tmp_path, shard=True, save_every=2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    how = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen(command, start_new_session=True, **how) for _ in range(2)]
    try:
        said = [node.communicate(timeout=120)[1] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert same_model(tmp_path, together / "dpo-split")
    assert timeless(metrics(tmp_path)) == timeless(metrics(together / "dpo-split"))

"""The planner against whole runs of train_dpo.py: every tensor counted, on the CPU.

python -m pytest tests/test_plan.py; the table of all points: python -m bench.memory
"""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

import train_dpo
from bench import memory
from bench.memory import GRID, SMALL, LiveBytes, Point
from bench.work import write_store
from dataset.packing import build_stream
from errors import InputError
from model import transformer
from model.huggingface import write_config
from model.lora import add_adapters
from model.transformer import PRESETS, ModelConfig, Transformer
from model.weights import save_model
from tests.conftest import make_model
from tests.loops import ROOT
from training import plan
from training.costs import (
    Plan,
    Weights,
    exchanged_bytes,
    forward_flops,
    make_stream,
    moments,
    peak,
    step_flops,
    step_seconds,
)
from training.distributed import Precision
from training.settings import parse

# The small shape is nearly all activations; of a single short pair in a larger one, weights are nearly all.
QUICK = [point for point in GRID if point.shape == SMALL]
QUICK += [Point("128 x 8, untied", 64, 1, flags) for flags in ("", "--reference cached", "--lora-rank 8")]
CONFIG = ModelConfig(6400, **PRESETS["26m"])


def assert_as_planned(point: Point) -> None:
    """Within 15 %, which is what the planner promises; docs/SCALE.md shows how close it comes."""
    assert point.planned()[1] == pytest.approx(memory.measured(point), rel=0.15)


# ---- What is measured


@pytest.mark.parametrize("point", QUICK, ids=str)
def test_peaks_of_runs_are_as_planned(point):
    """The real loop, from loading to saving: layouts, references, recomputation, adapters, bf16, windows."""
    assert_as_planned(point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in GRID if point not in QUICK], ids=str)
def test_all_peaks_are_as_planned(point):
    assert_as_planned(point)


@pytest.fixture(scope="module")
def on_ranks(request) -> dict[Point, float]:
    """Those points on several ranks that this run of pytest asks for, under one torchrun."""
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [params["point"] for params in specs if "point" in params and params["point"].ranks > 1]
    return dict(zip(asked, memory.measured_on_ranks(asked), strict=True))


QUICK_ON_RANKS = [
    Point("128 x 8, untied", 64, 1, flags, 2)
    for flags in ("--reference cached", "--shard", "--shard --reference cached", "--shard --lora-rank 8")
]


@pytest.mark.parametrize("point", QUICK_ON_RANKS, ids=str)
def test_peaks_on_a_rank_of_two_are_as_planned(point, on_ranks):
    """Parts, what is put together and in what buffers, and the buckets of copies."""
    assert point.planned()[1] == pytest.approx(on_ranks[point], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("point", list(memory.points(memory.FLAGS_OF_RANKS, 2)), ids=str)
def test_all_peaks_on_a_rank_of_two_are_as_planned(point, on_ranks):
    assert point.planned()[1] == pytest.approx(on_ranks[point], rel=0.15)


@pytest.mark.parametrize("flags", ["", "--reference cached --precision bf16"])
def test_peaks_with_the_vocabulary_in_chunks(flags, monkeypatch):
    """Chunks are why a large vocabulary fits; planned as if there were none, it would not."""
    monkeypatch.setattr(transformer, "LOGITS", 2**16)
    point = Point("128 x 8, untied", 64, 4, flags)
    assert_as_planned(point)
    whole = point.planned()[1]
    monkeypatch.setattr(transformer, "LOGITS", 2**25)
    assert point.planned()[1] > 1.1 * whole


def test_tensors_are_counted_once_and_while_they_live():
    """Views share memory, and what is freed must not count at the peak of others."""
    with LiveBytes() as live:
        x = torch.zeros(256)
        views = x[:10], x.view(16, 16)
        assert live.now == live.peak == 1024
        del x
        assert live.now == 1024
        del views
        assert (live.now, live.peak) == (0, 1024)
        y = torch.ones(64)
        assert (live.now, live.peak) == (256, 1024)
    assert len(y) == 64


def test_autocast_keeps_no_copy_of_the_weights(tmp_path):
    """With layers computed again nothing of their weights stays behind a forward, not even in bf16."""
    model = make_model(320, torch.float32, hidden_size=64, num_hidden_layers=8, intermediate_size=128)
    model.checkpoint_activations = True
    ids = [torch.zeros(n, dtype=torch.long).numpy() for n in (4, 3, 3)]
    stream = build_stream(write_store(tmp_path, [ids]), [0])
    with LiveBytes() as live, Precision("bf16", torch.device("cpu")).autocast():
        logps = model(stream)
        kept = live.now
    assert logps.requires_grad and kept < 0.5 * sum(2 * p.numel() for p in model.layers.parameters())


# ---- What is on paper


def a_plan(**options) -> Plan:
    return Plan(**{**dict(model="26m", vocab_size=6400, length=512, batch_size=32), **options})


def total(plan: Plan, config: ModelConfig = CONFIG) -> float:
    return sum(peak(config, make_stream(plan), plan)[1].values())


@pytest.mark.parametrize("preset", [name for name in PRESETS if "moe" not in name])
@pytest.mark.parametrize("rank", [0, 4])
def test_weights_are_those_of_the_model(preset, rank):
    """Counted in one layer; a model with all of its layers must agree."""
    config = ModelConfig(320, **PRESETS[preset])
    with torch.device("meta"):
        model = Transformer(config)
    if rank:
        add_adapters(model, rank, 1.0, "all", seed=0)
    weights = Weights.of(config, Plan(lora_rank=rank))
    assert weights.total == sum(p.numel() for p in model.parameters())
    assert weights.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", ["forked", "twin"])
@pytest.mark.parametrize("prompt", [100, 300])
def test_the_stream_is_that_of_equal_pairs(layout, prompt, tmp_path):
    """Segments that build_stream would not make are a plan for another program."""
    ids = [torch.zeros(n, dtype=torch.long).numpy() for n in (prompt, 200, 200)]
    real = build_stream(write_store(tmp_path, [ids] * 3), range(3), layout)
    planned = make_stream(Plan(length=prompt + 200, prompt=prompt, batch_size=3, layout=layout))
    assert planned.segments.tolist() == real.segments.tolist()
    assert (len(planned.tokens), len(planned.targets)) == (len(real.tokens), len(real.targets))
    assert [b.bias.shape for b in planned.blocks] == [b.bias.shape for b in real.blocks]


def test_sharding_leaves_each_gpu_its_part():
    """On two GPUs a half of weights, moments and reference, on many nearly nothing but what is at work."""
    one, two, many = ({**peak_of(gpus)} for gpus in (1, 2, 1000))
    for part in ("weights", "reference", "optimizer"):
        assert two[part] == one[part] / 2 and many[part] == one[part] / 1000
    copies = peak_of(2, shard=False)
    assert [copies[part] for part in ("weights", "reference", "optimizer")] == [
        one[part] for part in ("weights", "reference", "optimizer")
    ]
    assert copies["exchange"] == one["weights"]  # DDP's buckets are as large as the gradients.


def test_fused_attention_keeps_what_grows_with_the_length_alone():
    """No score is written; of twice the tokens twice as much is kept, where written out it is more."""
    kept = {}
    for fused in (False, True):
        runs = [a_plan(fused_attention=fused, length=length, micro_batch_size=1) for length in (2048, 4096)]
        kept[fused] = [peak(CONFIG, make_stream(run), run)[1]["activations"] for run in runs]
    assert kept[True][1] == pytest.approx(2 * kept[True][0], rel=1e-3) and kept[True][0] < kept[False][0]
    assert kept[False][1] > 3 * kept[False][0]


def peak_of(gpus: int, shard: bool = True) -> dict[str, float]:
    run = replace(a_plan(), gpus=gpus, shard=shard, batch_size=gpus)
    return moments(CONFIG, make_stream(run), run)["reference"]


def test_flops_of_a_step_by_hand():
    """Three forwards and the reference's; another for layers computed again; LoRA leaves one out."""
    run = a_plan(micro_batch_size=8)
    stream = make_stream(run)
    forward, logits = forward_flops(CONFIG, stream), 2 * len(stream.targets) * 512 * 6400
    assert run.micro_batches == 4 and len(stream.targets) == 8 * 2 * 256
    flops = {
        "": 4 * forward,
        "cached": 3 * forward,
        "again": 5 * forward - logits,
        "lora": 3 * forward,
    }
    for how, options in {
        "": {},
        "cached": dict(reference="cached"),
        "again": dict(checkpoint_activations=True),
        "lora": dict(lora_rank=4),
    }.items():
        run = a_plan(micro_batch_size=8, **options)
        assert step_flops(CONFIG, make_stream(run), run) == 4 * flops[how], how


def test_exchange_by_hand():
    """A ring of N sends (N - 1) / N of what it gathers; DDP once a step, shards in every micro-batch."""
    weights = Weights.of(CONFIG, a_plan()).total
    ddp = a_plan(gpus=4, micro_batch_size=2)
    assert exchanged_bytes(CONFIG, ddp) == 4 * 2 * weights * 3 / 4
    shards = a_plan(gpus=4, micro_batch_size=2, shard=True)
    assert shards.micro_batches == 4
    assert exchanged_bytes(CONFIG, shards) == 4 * 4 * 4 * weights * 3 / 4
    assert exchanged_bytes(CONFIG, replace(shards, reference="cached")) == 4 * 4 * 3 * weights * 3 / 4
    assert exchanged_bytes(CONFIG, a_plan(shard=True)) == 0
    slow = replace(shards, link=1e-3)
    assert step_seconds(CONFIG, make_stream(slow), slow) == exchanged_bytes(CONFIG, slow) / 1e6


# ---- The command


def said(capsys, arguments: str) -> str:
    plan.main(arguments.split())
    return capsys.readouterr().out


def test_what_fits_is_left_alone(capsys):
    out = said(capsys, "--model 26m --vocab-size 6400 --length 512 --batch-size 4 --pairs 1000")
    assert "Does not fit" not in out and "1,000 pairs" in out
    assert "--batch-size 4 --micro-batch-size 4 --precision bf16 --layout forked --reference live\n" in out


@pytest.mark.parametrize(
    "arguments, switch",
    [
        ("--model 26m --vocab-size 6400 --memory 0.9 --batch-size 1 --length 700", "--reference cached"),
        ("--model 26m --vocab-size 6400 --memory 3.2 --batch-size 16", "--micro-batch-size 8"),
        ("--model 26m --vocab-size 6400 --memory 4 --batch-size 1 --length 8192", "--fused-attention"),
        ("--model qwen2.5-0.5b --vocab-size 151936 --memory 16 --batch-size 1 --length 4096", "--checkpoint"),
        ("--model llama-3-8b --gpus 8 --memory 80", "--shard"),
        ("--model llama-3-8b --memory 80", "--lora-rank 16"),
    ],
)
def test_the_cheapest_switch_that_fits_is_named(arguments, switch, capsys):
    """Each is tried: what is named fits, and nothing that is faster would."""
    out = said(capsys, arguments)
    assert "Does not fit. The cheapest that does:" in out
    flags = out.split("The cheapest that does:")[1].split("train_dpo.py ")[1].split("\n")[0]
    assert switch in flags
    run = parse(Plan, "", arguments.split())
    config = plan.read_shape(run)
    chosen = parse(Plan, "", [*arguments.split(), *flags.split()])
    assert plan.needed(config, chosen) <= run.memory
    for other in plan.switched(run):
        faster = seconds(config, other) < seconds(config, chosen) and other.lora_rank <= chosen.lora_rank
        assert not faster or plan.needed(config, other) > run.memory


def seconds(config: ModelConfig, run: Plan) -> float:
    live = replace(run, reference="live")
    return step_seconds(config, make_stream(live), live)


def test_adapters_are_named_last(capsys):
    """They fit nearly anywhere and are another training: named only where nothing else would do."""
    assert "--lora-rank" not in said(capsys, "--model 26m --vocab-size 6400 --memory 1.6 --batch-size 16")


def test_flags_that_are_named_are_those_of_the_script(capsys):
    """A command line that the script refuses is no help."""
    out = said(capsys, "--model llama-3-70b --gpus 8 --batch-size 64 --length 2048")
    known = {f"--{f.name.replace('_', '-')}" for f in fields(train_dpo.Settings)}
    lines = [line for line in out.splitlines() if line.startswith("train_dpo.py")]
    assert len(lines) == 3
    for line in lines:
        assert {word for word in line.split() if word.startswith("--")} <= known


def test_more_gpus_would_do(capsys):
    """All weights of 70B are a matter of how many GPUs; adapters, of one machine."""
    out = said(capsys, "--model llama-3-70b --gpus 8 --batch-size 64 --length 2048")
    assert "--lora-rank 16" in out and "Or on 32 GPUs" in out
    assert "not on 4096 GPUs either" in said(capsys, "--model llama-3-70b --memory 1")


def test_a_folder_is_planned_by_its_config(tmp_path):
    """Ours and Hugging Face's; no weight is looked at."""
    model = make_model(320, torch.float32)
    save_model(tmp_path / "ours", model)
    (tmp_path / "ours" / "model.pt").unlink()
    (tmp_path / "theirs").mkdir()
    config = write_config(model.config, torch.float32)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    ours, theirs = (plan.read_shape(Plan(model=str(tmp_path / name))) for name in ("ours", "theirs"))
    assert ours == model.config
    assert total(a_plan(), ours) == total(a_plan(), theirs)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--model", "/nowhere"], "/nowhere: no model folder"),
        (["--model", "26m"], "--vocab-size"),
        (["--model", "tiny-moe", "--vocab-size", "320"], "mixture of experts"),
        (["--model", "llama-3-8b", "--length", "100", "--prompt", "100"], "--prompt 100 leaves no response"),
        (["--model", "llama-3-8b", "--gpus", "0"], "--gpus must be at least 1"),
        (["--model", "llama-3-8b", "--tflops", "0"], "--tflops must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, reason):
    with pytest.raises(InputError, match=reason):
        plan.main(arguments)


def test_the_command_runs_as_documented():
    """And a bad one ends in one line, as the scripts do."""
    command = [sys.executable, "-m", "training.plan", "--model"]
    good = subprocess.run([*command, "llama-3-8b"], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and "at the peak" in good.stdout
    bad = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1

"""The benchmark gives everyone the same work and counts it right. Times are nobody's test."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import growth, run, work
from bench.tables import tables
from dataset.packing import LAYOUTS, Windows, build_stream
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from model.config import ModelConfig
from tests.conftest import shared
from training.settings import SAMPLE

CASE = work.Case(work.TINY, 300, 400, pairs=3, steps=2)


def test_pairs_fit_repeat_and_come_in_our_order():
    """TRL and the textbook get the pairs of a step in the order in which train_dpo.py takes them."""
    pairs = work.synthetic_pairs(CASE)
    assert len(pairs) == 9
    for pair, again in zip(pairs, work.synthetic_pairs(CASE), strict=True):
        assert all((a == b).all() for a, b in zip(pair, again, strict=True))
    longest = [len(p) + max(len(c), len(r)) for p, c, r in pairs]
    assert max(longest) <= 400
    windows = Windows(9, 3, seed=0)
    assert CASE.windows == [windows[step].tolist() for step in range(3)]
    assert sorted(work.timed(CASE) + CASE.windows[0]) == list(range(9))
    assert max(longest[row] for row in CASE.windows[0]) <= 2 * 55  # The step to warm up is a short one.


def test_the_store_is_the_pairs(tmp_path):
    """Ours reads ids from a store; it must hold what the others are given."""
    pairs = work.synthetic_pairs(CASE)
    store = work.write_store(tmp_path, pairs)
    assert len(store) == 9
    for row, (prompt, chosen, rejected) in enumerate(pairs):
        for ids, (kept, supervised), answer in zip(
            (prompt, chosen, rejected), store.row(row), (False, True, True), strict=True
        ):
            assert kept.tolist() == ids.tolist() and (supervised == answer).all()
        assert store.target_counts[row] == len(chosen) + len(rejected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_those_that_torch_counts(layout, tmp_path):
    """Torch counts every product that is made; what a mask then hides is not counted by us."""
    store = work.write_store(tmp_path, work.synthetic_pairs(CASE))
    stream, model = build_stream(store, range(9), layout), work.make_model(CASE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(stream)
    config = ModelConfig(CASE.vocabulary, **CASE.shape)
    hidden = sum(int(block.bias.isinf().sum()) for block in stream.blocks)
    wasted = 4 * config.num_attention_heads * config.head_dim * hidden * config.num_hidden_layers
    assert work.forward_flops(config, stream) == counter.get_total_flops() - wasted


def test_each_switch_saves_and_the_last_is_the_floor(tmp_path):
    """Counted twice: from the streams of the timed rows, and from lengths alone."""
    store = work.write_store(tmp_path, work.synthetic_pairs(CASE))
    counted = list(work.switches(CASE).values())
    assert counted == sorted(counted, reverse=True) and len(set(counted)) == 6
    assert counted[-1] == work.run_flops(CASE, store)


def test_a_moved_model_is_another():
    """With equal models every loss is ln 2, and no comparison of losses could fail."""
    one, same, moved = (work.make_model(CASE, seed) for seed in (0, 0, 1))
    assert torch.equal(one.norm.weight, same.norm.weight)
    assert not torch.equal(one.norm.weight, moved.norm.weight)


@pytest.fixture
def no_data(tmp_path, monkeypatch) -> Path:
    """An empty folder where public data would be."""
    monkeypatch.setattr(work, "DATA", tmp_path)
    return tmp_path


def kept_rows(case: work.Case) -> list[list[list[int]]]:
    """Prompt, chosen and rejected ids as training reads them."""
    tokenizer = ChatTokenizer(SAMPLE / "tokenizer.json")
    store = open_store(work.DATA / case.data, "preferences", tokenizer, case.max_length, skip_bad=True)
    return [[ids.tolist() for ids, _ in store.row(row)] for row in range(len(store))]


@pytest.mark.parametrize("file", ["ragged.jsonl", work.HH, work.ULTRAFEEDBACK])
def test_real_pairs_are_the_rows_that_training_reads(file, request, monkeypatch):
    """Whole, with their end tokens, each once; only those to warm up are cut."""
    path = request.getfixturevalue("ragged") if file == "ragged.jsonl" else shared(file)
    monkeypatch.setattr(work, "DATA", path.parents[file.count("/")])
    case = work.Case(work.TINY, 2048, 400, pairs=2, steps=2, data=file)
    rows = kept_rows(case)
    pairs = [[ids.tolist() for ids in pair] for pair in work.make_pairs(case)]
    assert len(pairs) == 6
    timed = [rows.index(pairs[place]) for place in work.timed(case)]
    assert len(set(timed)) == 4
    for place in case.windows[0]:
        assert any(
            all(ids == whole[: len(whole) // 10 + 2] for ids, whole in zip(pairs[place], row, strict=True))
            for row in rows
        )


def test_too_few_real_pairs_are_refused(ragged, monkeypatch):
    monkeypatch.setattr(work, "DATA", ragged.parent)
    case = work.Case(work.TINY, 2048, 400, pairs=8, steps=1, data=ragged.name)
    with pytest.raises(InputError, match=r"ragged.jsonl: \d pairs are not the 16 that --pairs and --steps"):
        work.make_pairs(case)


def test_a_case_without_its_data_is_left_out_and_named(no_data, monkeypatch, capsys):
    monkeypatch.setattr(run, "look_at", lambda *arguments: ("a machine", {}))
    run.main(["--cases", "7.5M, HH", "--json", str(no_data / "bench.json")])
    assert f"7.5M, HH: left out, there is no {no_data / work.HH}" in capsys.readouterr().out
    assert json.loads((no_data / "bench.json").read_text())["cases"] == {}


def test_tokens_count_a_prompt_for_each_side():
    pairs = [[np.zeros(length) for length in lengths] for lengths in ((3, 1, 2), (5, 4, 4))]
    assert work.tokens(pairs, [1]) == 5 + 4 + 5 + 4
    assert work.tokens(pairs, range(2)) == 18 + 3 + 1 + 3 + 2


@pytest.mark.parametrize("pairs, forward, expected", [(8, 0, 8), (64, 8, 8), (4, 8, 4), (12, 8, 4)])
def test_pairs_a_forward_divide_those_a_step(pairs, forward, expected):
    """TRL counts forwards until a step is full; a remainder would shift all its windows."""
    assert replace(CASE, pairs=pairs, forward=forward).micro_batch == expected


# ---- What is said of the runs


def cells(markdown: str, first: str) -> dict[str, dict[str, str]]:
    """The rows of the table whose first column has this name, by their first cells."""
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith(f"| {first} |")]
    [[names, _, *rows]] = tables
    split = [[cell.strip() for cell in row.strip("|").split("|")] for row in (names, *rows)]
    return {row[0]: dict(zip(split[0], row, strict=True)) for row in split[1:]}


def runs(seconds: list[float], reference: float, gigabytes: float, precision: str = "fp32") -> list[dict]:
    peak = {"peak_bytes": gigabytes * 1e9, "reference": reference, "precision": precision}
    return [{"seconds": time, **peak} for time in seconds]


FIGURES = {
    "pairs": 8,
    "tokens": 4000,
    "flops": 100e9,
    "out_of_memory": ["textbook, padded"],
    "runs": {
        "TRL, as shipped": runs([25.0], 0, 4, "bf16"),
        "TRL, defaults": runs([30.0, 10.0, 11.0], 0, 8),
        "TRL, best": runs([8.0], 4, 10),
        "textbook, padded": [],
        "ours, forked cached": runs([2.0, 2.5, 1.0], 3, 2),
    },
}


def test_ratios_by_hand():
    """TRL asks a live reference within its 11 seconds an epoch; ours asks 3 seconds, once, and then takes 2.

    1 epoch: 11 / (2 + 3). 3 epochs: 33 / (6 + 3). Of many only 11 / 2 is left.
    """
    markdown = tables("case", FIGURES, {"fp32": 200e9})
    times, rates = cells(markdown, "time"), cells(markdown, "memory and rates")
    ours = times["ours, forked cached"]
    assert ours["rounds"] == "3" and ours["s (range)"] == "2.00 (1.00 to 2.50)"
    ratios = [ours[f"× TRL, defaults: {epochs}"] for epochs in ("1 epoch", "3 epochs", "many")]
    assert ratios == ["2.20", "3.67", "5.50"]
    assert ours["× TRL, best"] == "4.00" and ours["× TRL, as shipped"] == "12.50"
    assert times["TRL, best"]["× TRL, defaults: 1 epoch"] == "0.92"
    assert times["TRL, defaults"]["× TRL, defaults: 1 epoch"] == "1.00"
    assert list(rates["ours, forked cached"].values())[1:] == [
        "2.00", "0.25", "0.50", "4.00", "2,000", "50.0", "25%"
    ]  # fmt: skip
    assert rates["TRL, as shipped"]["of the matrix rate"] == ""  # No rate of bf16 is known here.
    assert "textbook, padded" not in times and "Out of memory: textbook, padded" in markdown


def test_defaults_in_bf16_are_as_shipped():
    figures = {"TRL, defaults": runs([6.0], 0, 8, "bf16"), "ours, forked live": runs([2.0], 0, 1, "bf16")}
    times = cells(tables("case", {**FIGURES, "runs": figures}, {}), "time")
    assert times["ours, forked live"]["× TRL, as shipped"] == "3.00"
    assert times["ours, forked live"]["× TRL, best"] == ""


def test_what_runs_out_of_memory_ends_alone(monkeypatch, capsys):
    """On a GPU a padded loop may not fit where others do; any other failure ends the benchmark."""

    def worker(arguments, threads):
        if arguments[-1] == "--check":
            return {"ours, forked": 0.7}
        if arguments[-1] == "textbook, padded":
            raise InputError("bench.run failed: torch.OutOfMemoryError: CUDA out of memory.")
        if arguments[-1] == "TRL, best":
            raise InputError("bench.run failed: something else")
        return {"seconds": 1.0}

    monkeypatch.setattr(run, "worker", worker)
    some = ["--quick", "--cases", "tiny", "--rounds", "2", "--only", "textbook, padded", "ours, twin live"]
    found = run.measure(run.parse(some))["tiny"]
    assert found["out_of_memory"] == ["textbook, padded"]
    assert found["runs"] == {"textbook, padded": [], "ours, twin live": [{"seconds": 1.0}] * 2}
    assert capsys.readouterr().out.count("out of memory") == 1
    with pytest.raises(InputError, match="something else"):
        run.measure(run.parse(["--quick", "--cases", "tiny", "--only", "TRL, best"]))


# ---- On a GPU


def test_a_gpu_has_cases_of_its_own_in_bf16():
    cpu, cuda = run.parse([]), run.parse(["--device", "cuda"])
    assert (cpu.precision, cuda.precision) == ("fp32", "bf16")
    assert list(cpu.cases) == list(work.CASES) and list(cuda.cases) == list(work.CUDA_CASES)


@pytest.mark.parametrize("device, precision, native, timed", [
    ("cpu", "fp32", True, True),
    ("cpu", "fp32", False, False),
    ("cpu", "bf16", True, False),
    ("cuda", "fp32", False, True),
    ("cuda", "bf16", False, False),
])  # fmt: skip
def test_trl_as_shipped_is_timed_once_and_not_for_hours(device, precision, native, timed, monkeypatch):
    """In bf16 its defaults are that. Emulated bf16 is a hundred times slower, and only waited for by name."""
    monkeypatch.setattr(run, "cpu_multiplies_bf16", lambda: native)
    flags = ["--device", device, "--precision", precision]
    left_out = set() if timed else {run.SHIPPED}
    left_out |= {run.FUSED} if device == "cpu" else set()  # It trains on CUDA only.
    assert set(run.IMPLEMENTATIONS) - set(run.parse(flags).only) == left_out
    assert run.parse([*flags, "--only", "TRL, as shipped"]).only == ["TRL, as shipped"]


def test_the_clock_waits_for_a_gpu_that_works(monkeypatch):
    """A GPU's calls return at once; read without waiting, the clock says how fast it was asked."""
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("synchronize"))
    monkeypatch.setattr(work.time, "perf_counter", lambda: called.append("clock") or 1.0)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        assert work.now() == 1.0
    assert called == ["clock", "synchronize", "clock"]


def test_peak_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert work.peak_bytes("cuda") == 7
    assert 5e7 < work.peak_bytes("cpu") < 1e11  # This process holds torch: bytes, not kilobytes.


def test_gpu_cases_are_as_large_as_they_say():
    sizes = {"26M": (26e6, 6400), "104M": (104e6, 6400), "0.5B": (0.494e9, 152_000)}
    for name, case in work.CUDA_CASES.items():
        parameters, vocabulary = sizes[name.split(",")[0]]
        assert growth.parameters(case.shape, vocabulary) == pytest.approx(parameters, rel=0.01)
    assert {case.pairs for case in work.CUDA_CASES.values()} == {8, 64}
    assert {case.vocabulary for case in work.CUDA_CASES.values()} == {6400, 32_000, 152_000}
    half_a_billion = replace(work.CUDA_CASES["0.5B, 8 pairs"], steps=50)
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in work.synthetic_pairs(half_a_billion))
    assert 1536 < longest <= 2048


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_line():
    with pytest.raises(InputError, match="--device cuda: torch found no CUDA device"):
        run.main(["--device", "cuda", "--quick"])


# ---- How cost grows


@pytest.mark.parametrize("quick", [False, True])
def test_each_panel_changes_one_thing(quick):
    points = growth.points(quick)
    assert len({point.name for point in points}) == len(points)
    panels = {panel: [p for p in points if p.panel == panel] for panel in growth.PANELS}
    for point in points:
        prompt, chosen, rejected = point.case.lengths
        assert prompt + chosen == point.case.max_length and chosen == rejected
        lengths = [[len(ids) for ids in pair] for pair in work.make_pairs(point.case)]
        assert all(lengths[row] == [prompt, chosen, rejected] for row in work.timed(point.case))
    totals = {sum(point.case.lengths) for point in panels["prompt"]}
    assert totals == {96 if quick else 768}
    for point in panels["prompt"]:
        assert point.x == point.case.lengths[0] / sum(point.case.lengths)
    assert sorted(p.x for p in panels["prompt"] if p.layout == "twin") == sorted(
        p.x for p in panels["prompt"] if p.layout == "forked"
    )
    assert all(point.x == point.case.max_length for point in panels["length"])
    assert all(point.x == point.case.vocabulary for point in panels["vocabulary"])
    for panel, same in {"vocabulary": ("shape", "lengths"), "model": ("vocabulary", "lengths")}.items():
        for name in same:
            values = [getattr(point.case, name) for point in panels[panel]]
            assert values == values[:1] * len(values)


def test_parameters_are_those_of_the_model():
    model = work.make_model(CASE)
    assert growth.parameters(CASE.shape, CASE.vocabulary) == sum(p.numel() for p in model.parameters())


def test_a_point_of_growth_by_hand():
    """Four pairs in 2 seconds, where the products alone would take half a second."""
    point = growth.points(quick=True)[0]
    flops = run.describe(point.case)["flops"]
    row = growth.figures(point, runs([2.0, 9.0, 1.0], 1, 0.5), rate=2 * flops)
    assert row["pairs_per_second"] == 2.0 and row["fastest"] == pytest.approx(8.0) and row["rounds"] == 3
    assert row["peak_bytes"] == 0.5e9
    assert row["least_bytes"] == 4 * 4 * growth.parameters(point.case.shape, 6400)
    found = cells(growth.table([row]), "what grows")["The prompt's share"]
    assert list(found.values())[1:] == ["0.125", "forked", "3", "2.00", "8.00", "25%", "0.50"]


def test_growth_is_drawn_also_where_points_are_missing(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [growth.figures(p, runs([1.0], 0, 1), rate=1e12) for p in growth.points(quick=True)]
    for some in (rows, rows[:1]):
        growth.draw(some, tmp_path / "growth.png")
        assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_is_run_in_bf16_in_a_process_of_its_own():
    """The loop itself, asked for by name, in the precision that is asked for."""
    how = ["--quick", "--precision", "bf16", "--worker", "prompt 0.5 forked"]
    found = run.worker(how, 1, "bench.growth")
    assert found["seconds"] > 0 and found["reference"] > 0 and found["precision"] == "bf16"
    assert found["loss"] == pytest.approx(math.log(2), abs=0.05)

"""Model folders: loading returns what was saved, and refuses everything else."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

import train_dpo
from errors import InputError
from model.export import export_adapter
from model.lora import add_adapters
from model.reward import RewardModel
from model.transformer import Transformer
from model.weights import load_model, read_ours, save_model
from tests.conftest import MODEL_OPTIONS, make_model


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path, make_model(50), settings={"lr": 1.0})
    return tmp_path


@pytest.mark.parametrize("options", MODEL_OPTIONS)
def test_save_and_load_is_the_identity(tmp_path, options):
    """A lower precision, a lost bias or an untied head would change the model silently."""
    model = make_model(50, torch.float32, **MODEL_OPTIONS[options])
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def edit_config(folder, **changes) -> None:
    """Change keys of config.json; None removes one."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    text = json.dumps({name: value for name, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)


def change(folder, edit):
    """Edit the weights on purpose: config.json then has no digest any more."""
    weights = torch.load(folder / "model.pt", weights_only=True)
    edit(weights)
    torch.save(weights, folder / "model.pt")
    edit_config(folder, sha256=None)


@pytest.mark.parametrize("edit, reason", [
    (lambda w: w.pop("norm.weight"), r"norm\.weight is missing"),
    (lambda w: w.update(extra=torch.zeros(1)), "extra is unexpected"),
    (lambda w: w.update({"norm.weight": torch.ones(3)}), r"norm\.weight has the shape \(3,\), expected \(16"),
    (lambda w: w.update(extra="text"), "not a dict of weights"),
    (lambda w: w.update({"norm.weight": torch.ones(16).long()}), "not a dict of weights"),
], ids=["missing", "unexpected", "shape", "text", "integers"])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(folder, edit, reason):
    """A model with some weights left random would still train."""
    change(folder, edit)
    with pytest.raises(InputError, match=reason) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_config_of_another_size_is_refused_in_one_short_line(folder):
    """A list of hundreds of names hides the reason."""
    shape = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, model={**shape, "hidden_size": 2048, "head_dim": 64})
    with pytest.raises(InputError, match=r"has the shape \(.*\), expected .*; and \d+ more") as raised:
        load_model(folder)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("changes, reason", [
    ({"num_hidden_layers": 1024}, "config.json has 1024 layers, the weights have 2"),
    ({"num_experts": 1024}, "config.json has 1024 experts, the weights have 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is not an integer from 0 to 1024"),
], ids=["layers", "experts", "beyond the limit"])  # fmt: skip
def test_absurd_sizes_are_refused_before_a_model_is_built(folder, changes, reason, monkeypatch):
    """A million modules take minutes to make, and each tensor may be larger than the memory."""
    monkeypatch.setattr(RewardModel, "__init__", None)
    monkeypatch.setattr(Transformer, "__init__", None)
    shape = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, model={**shape, **changes})
    with pytest.raises(InputError, match=reason):
        load_model(folder)


def test_a_large_shape_takes_no_memory_before_it_is_compared(folder):
    """The config of a model of 20 GB beside a file of 30 kB."""
    shape = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, model={**shape, "vocab_size": 2**20, "intermediate_size": 2**20, "hidden_size": 1024})
    with pytest.raises(InputError, match=r"the weights do not fit config\.json"):
        load_model(folder)


def test_a_hostile_file_runs_nothing(folder, monkeypatch):
    """Unpickling runs code from the file; a model folder from a stranger must not."""
    monkeypatch.chdir(folder)
    torch.save({"norm.weight": Evil()}, folder / "model.pt")
    edit_config(folder, sha256=None)
    with pytest.raises(InputError, match=r"unreadable \(it contains other objects than tensors\)"):
        load_model(folder)
    assert not (folder / "PWNED").exists()


# ---- Damage


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_torn_file_is_refused(folder, size):
    """A file that a full disk cut short is not a model."""
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[:size])
    with pytest.raises(InputError, match=r"model\.pt: unreadable"):
        load_model(folder)


def flip_a_bit(path) -> None:
    """Change the sign of the first weight in the file."""
    weight = next(iter(torch.load(path, weights_only=True).values())).flatten()[:4].numpy()
    data = bytearray(path.read_bytes())
    data[data.index(weight.tobytes()) + weight.itemsize - 1] ^= 128
    path.write_bytes(data)


def test_a_flipped_bit_is_found(folder, tmp_path):
    """torch.load accepts it as a weight: of 300 flips in a finished model 265 loaded silently."""
    before = load_model(folder).state_dict()
    flip_a_bit(folder / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt is damaged: its SHA-256 is not the one in config\.json"):
        load_model(folder)
    edit_config(folder, sha256=None)  # An older folder, which has no digests, is accepted.
    after = load_model(folder).state_dict()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_a_flipped_bit_of_an_adapter_is_found(tmp_path):
    """An export reads adapter.pt alone."""
    model = make_model(50, torch.float32)
    add_adapters(model, 3, 12.0, "all", seed=0)
    save_model(tmp_path / "run", model, settings={"model": "org/base"})
    export_adapter(tmp_path / "run", tmp_path / "out", torch.float32)
    flip_a_bit(tmp_path / "run" / "adapter.pt")
    with pytest.raises(InputError, match=r"adapter\.pt is damaged: its SHA-256"):
        export_adapter(tmp_path / "run", tmp_path / "out", torch.float32)


def test_compressed_weights_are_refused(folder):
    """A gigabyte of zeros compresses to a megabyte, and needs a gigabyte of memory when it is read."""
    with zipfile.ZipFile(folder / "model.pt") as stored:
        entries = {entry: stored.read(entry) for entry in stored.namelist()}
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
    edit_config(folder, sha256=None)
    with pytest.raises(InputError, match=r"compressed entries, which torch\.save never writes"):
        load_model(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.pt"])
def test_only_regular_files_are_read(folder, name, kind):
    """Reading a FIFO waits for ever, and /dev/zero fills the memory."""
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        load_model(folder)


@pytest.mark.parametrize("text, reason", [
    ("{", "damaged or incomplete JSON"),
    ("", "damaged or incomplete JSON"),
    ("[" * 100_000, "damaged or incomplete JSON"),
    ('{"vocab_size": 1' + "0" * 5000 + "}", "damaged or incomplete JSON"),
    ("[]", "not a JSON object"),
    ('{"model": {"depth": 3}}', "unexpected keyword argument 'depth'"),
    ('{"model": {}}', "vocab_size"),
    ('{"model": {"vocab_size": 50, "hidden_size": "16"}}', "hidden_size '16' is not an integer"),
    ("{}", 'no "model" in it'),
], ids=range(9))  # fmt: skip
def test_a_config_of_something_else_is_refused(folder, text, reason):
    """A traceback from deep inside does not name the folder."""
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json: not the config of a model: .*{reason}"):
        load_model(folder)


# ---- Folders that are not there


def test_a_missing_config_and_missing_weights_have_their_own_messages(folder, tmp_path_factory):
    with pytest.raises(InputError, match=r"is not a model folder: it has no config\.json"):
        load_model(tmp_path_factory.mktemp("empty"))
    (folder / "model.pt").unlink()
    with pytest.raises(InputError, match=r"no model\.pt: the training did not finish"):
        load_model(folder)


def test_the_file_of_weights_is_not_the_folder(folder):
    """Many pass the path of model.pt itself."""
    reason = f"is a file, not a model folder: give the folder, {folder}"
    with pytest.raises(InputError, match=reason):
        load_model(folder / "model.pt")
    with pytest.raises(InputError, match=reason):
        train_dpo.main(["--model", str(folder / "model.pt"), "--out", str(folder / "out")])


@pytest.mark.parametrize("name, made, reason", [
    ("Qwen/Qwen2.5-0.5B-Instruct", "other",
     "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen2.5-0.5B-Instruct, "
     "then --model Qwen2.5-0.5B-Instruct"),
    ("runs/sft", "runs/demo/sft", "make demo has left one in runs/demo/sft: give --model runs/demo/sft"),
    ("runs/sft", "other", "python train_sft.py writes one to runs/sft"),
    ("26", "other", "starts from a preset: tiny, tiny-moe, 26m, "),
    ("models/mine", "models", "python train_sft.py"),
])  # fmt: skip
def test_a_missing_folder_is_named_with_the_remedy(name, made, reason, tmp_path, monkeypatch):
    """A hub name, the demo's folder, a skipped step: the message names the next command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / made).mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{name}: there is no such model folder; .*{reason}"):
        load_model(name)


# ---- Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages as Linux does")
def test_a_file_of_weights_is_mapped_and_not_read_into_memory(tmp_path):
    """Eight ranks that each read the file and copy it need sixteen times its size."""

    def own_memory() -> int:
        """Bytes of this process that do not belong to mapped files."""
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    torch.save({"weight": torch.ones(2**24)}, tmp_path / "model.pt")  # 64 MiB
    before = own_memory()
    weights = read_ours(tmp_path, "model.pt", {})
    assert weights["weight"].sum() == 2**24  # Every page has been read.
    assert own_memory() - before < 2**25


def test_settings_are_kept_beside_the_shape(folder):
    assert json.loads((folder / "config.json").read_text())["settings"] == {"lr": 1.0}

"""Model folders: what is saved is what is loaded, and nothing else gets in.

    python -m pytest tests/test_weights.py
"""

import json
import os

import pytest
import torch

from errors import InputError
from model.weights import load_model, save_model
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
    """A lower precision, a lost bias or an untied head would change the model without a word."""
    model = make_model(50, torch.float32, **MODEL_OPTIONS[options])
    save_model(tmp_path, model)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def change(folder, edit):
    weights = torch.load(folder / "model.pt", weights_only=True)
    edit(weights)
    torch.save(weights, folder / "model.pt")


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda weights: weights.pop("norm.weight"), r"Missing key.*norm\.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda weights: weights.update({"norm.weight": torch.ones(3)}), r"size mismatch for norm\.weight"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, edit, reason):
    """Loading what fits and leaving the rest random gives a model that trains, from noise."""
    change(folder, edit)
    with pytest.raises(InputError, match=f"(?s){reason}"):
        load_model(folder)


def test_a_hostile_file_runs_nothing(folder, monkeypatch):
    """Unpickling runs whatever a file says; a model folder from elsewhere must not be able to."""
    monkeypatch.chdir(folder)
    torch.save({"norm.weight": Evil()}, folder / "model.pt")
    with pytest.raises(InputError, match="unreadable"):
        load_model(folder)
    assert not (folder / "PWNED").exists()


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_torn_file_is_refused(folder, size):
    """A file that a full disk cut short is not a model."""
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[:size])
    with pytest.raises(InputError, match="unreadable"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"depth": 3}}', '{"model": {}}'])
def test_a_config_of_something_else_is_refused(folder, text):
    """A traceback from deep inside tells a user nothing about the folder that was named."""
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: not the config of a model"):
        load_model(folder)


def test_no_folder_and_no_weights_are_told_apart(folder, tmp_path_factory):
    with pytest.raises(InputError, match="no model folder"):
        load_model(tmp_path_factory.mktemp("empty"))
    (folder / "model.pt").unlink()
    with pytest.raises(InputError, match=r"no model\.pt"):
        load_model(folder)


def test_settings_are_kept_beside_the_shape(folder):
    assert json.loads((folder / "config.json").read_text())["settings"] == {"lr": 1.0}

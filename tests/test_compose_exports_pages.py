"""Models on mapped files: what transformers loads, bit for bit, with a layer at a time in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from graftory.adapters import attach
from graftory.compose import export_folder
from graftory.compose.exports.files import lying_tensors
from graftory.compose.exports.pages import Pages
from graftory.config import DoraConfig
from graftory.errors import StorageError
from tests.adapter_samples import make

SMAPS = Path("/proc/self/smaps")
IDS = torch.tensor([[3, 5, 7, 9], [4, 6, 8, 2]])
PAGE = 65536
"""What the system maps around a page that is read."""
pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="the system does not say which pages are in memory")


def llama(**fields: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 64}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4, **fields)).eval()


def mapped(folder: Path) -> list[tuple[int, int, int]]:
    """First and last address of every mapped file below a folder, and the bytes of it that are in memory."""
    found, lines = [], iter(SMAPS.read_text().splitlines())
    for line in lines:
        if str(folder) in line:
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            found.append((start, end, 1024 * int(next(one for one in lines if one.startswith("Rss:")).split()[1])))
    return found


def resident(folder: Path) -> int:
    """Bytes of files below a folder that this process has in memory."""
    return sum(size for _, _, size in mapped(folder))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "pickle"])
def test_it_is_what_transformers_loads_and_lies_in_files(tmp_path: Path, stored: str) -> None:
    model = llama().to(torch.bfloat16 if stored == "bfloat16" else torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="2MB")
    if stored == "pickle":
        tensors = {
            k: t.clone() for file in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(file).items()
        }
        for file in (tmp_path / "base").glob("*.safetensors*"):
            file.unlink()
        torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "scratch").mkdir()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pages = Pages(lying_tensors(str(tmp_path / "base")), tmp_path / "scratch")
    paged: Any = pages.load(type(loaded), loaded.config)
    places = mapped(tmp_path)
    for (name, ours), (other, theirs) in zip(paged.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
        assert any(start <= ours.data_ptr() < end for start, end, _ in places), "no copy in memory"
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(paged(input_ids=IDS).logits, loaded.eval()(input_ids=IDS).logits)
    # what was fp32 on the disk is read where it lies
    assert (tmp_path / "scratch" / "numbers").exists() == (stored != "float32")


def test_a_comparison_has_one_layer_in_memory(tmp_path: Path) -> None:
    """Both models, base + adapter and the written one: never more than a layer's pages and those around."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    adapter = make(model, DoraConfig(rank=2))
    adapted = attach(model, {"a": adapter})
    with torch.no_grad(), adapted.route("a"):
        wanted = adapted(input_ids=IDS).logits
    adapted.detach()
    seen: list[int] = []

    def look(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.Linear):
            seen.append(resident(tmp_path))

    with register_module_forward_hook(look):
        done = export_folder(str(tmp_path / "base"), adapter, tmp_path / "plain", batches=[{"input_ids": IDS}])
    linear = 4 * 7 + 1
    assert len(seen) == 2 * linear
    assert max(seen) >= largest, "it does count"
    assert max(seen) <= 2 * largest + 4 * PAGE < whole / 3
    assert done.check is not None
    assert done.check.max_difference < 1e-4
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - wanted).abs().max() < 1e-4
    assert {each.name for each in tmp_path.iterdir()} == {"base", "plain"}, "nothing is left beside"


def test_no_room_for_fp32_is_said(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    pages = Pages(lying_tensors(str(tmp_path / "base")), tmp_path / "nowhere")
    with pytest.raises(StorageError, match="needs room on the disk for the model in fp32"):
        pages.tensors()

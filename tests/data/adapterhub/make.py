"""Made the files beside it, with AdapterHub's own library, and checks what graftory writes for it.

It needs an environment of its own: `pip install torch==2.13.0 adapters==1.3.0` (which brings transformers 4.57), then

    python tests/data/adapterhub/make.py                  # every folder anew
    python tests/data/adapterhub/make.py check FOLDER     # load what `hub export --format adapterhub` wrote, compare
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
HEAD: Mapping[str, Any] = {"num_labels": 3, "id2label": LABELS}


def configs() -> Mapping[str, tuple[str, Any, Mapping[str, Any] | None, bool]]:
    """Folder -> base, configuration, head (or none), and whether the file looks like one of an old version."""
    hub: Any = import_module("adapters")
    lora = hub.LoRAConfig(r=3, alpha=6, attn_matrices=["q", "k"], intermediate_lora=True, output_lora=True)
    return {
        "seq_bn": ("bert", hub.SeqBnConfig(reduction_factor=4), HEAD, False),
        "double_seq_bn": ("bert", hub.DoubleSeqBnConfig(reduction_factor=8), HEAD, False),
        "par_bn": ("bert", hub.ParBnConfig(reduction_factor=2), HEAD, False),
        "lora": ("bert", lora, HEAD, False),
        "gelu": ("bert", hub.SeqBnConfig(reduction_factor=4, non_linearity="gelu"), HEAD, False),
        "gelu_old": ("bert", hub.SeqBnConfig(reduction_factor=4, non_linearity="gelu"), HEAD, True),
        "pooled": ("bert", hub.SeqBnConfig(reduction_factor=4), {**HEAD, "layers": 1, "use_pooler": True}, False),
        "headless": ("bert", hub.DoubleSeqBnConfig(reduction_factor=4, leave_out=[0]), None, False),
        "roberta": ("roberta", hub.DoubleSeqBnConfig(reduction_factor=4), HEAD, False),
    }


def base_model(kind: str) -> Any:
    """The tiny base of the fixtures; its weights are beside this file once it has been made."""
    hub: Any = import_module("adapters")
    transformers: Any = import_module("transformers")
    config, model = {
        "bert": (transformers.BertConfig, hub.BertAdapterModel),
        "roberta": (transformers.RobertaConfig, hub.RobertaAdapterModel),
    }[kind]
    torch.manual_seed(0)
    made = model(config(**SIZES, initializer_range=0.3)).eval()
    weights = HERE / f"{kind}.safetensors"
    if weights.exists():
        made.load_state_dict(load_file(weights), strict=False)
    else:
        save_file({key: value for key, value in made.state_dict().items() if "prompt_tuning" not in key}, weights)
    return made


def batch() -> dict[str, Tensor]:
    """Six rows of token ids, some padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(6):
        ids[row, 4 + row :] = 1
        mask[row, 4 + row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answers(model: Any) -> dict[str, Tensor]:
    """Logits if there is a head, and the last hidden states."""
    with torch.no_grad():
        output = model(**batch(), output_hidden_states=True)
    found = {"hidden": output.hidden_states[-1]}
    return {**found, "logits": output.logits} if hasattr(output, "logits") else found


def make() -> None:
    """Every folder, with what the library answers."""
    for number, (name, (kind, config, head, old)) in enumerate(configs().items()):
        model = base_model(kind)
        model.add_adapter(name, config=config)
        if head is not None:
            model.add_classification_head(name, **head)
        model.set_active_adapters(name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if f".{name}." in key:
                    weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
        folder = HERE / name
        model.save_adapter(str(folder), name, with_head=head is not None, use_safetensors=True)
        if old:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "version"}))
            model = base_model(kind)
            model.load_adapter(str(folder), load_as=name, use_safetensors=True)
            model.set_active_adapters(name)
            model.eval()
        found = answers(model.eval())
        save_file({key: value.contiguous() for key, value in found.items()}, HERE / f"{name}.expected.safetensors")
        print(name, *((key, tuple(value.shape)) for key, value in found.items()))


def check(folder: Path) -> None:
    """Load what graftory wrote and compare with `expected.safetensors` in the same folder."""
    for place in sorted(path.parent for path in folder.rglob("adapter_config.json")):
        kind = json.loads((place / "adapter_config.json").read_text())["model_type"]
        model = base_model(kind)
        name = model.load_adapter(str(place), use_safetensors=True)
        model.set_active_adapters(name)
        expected, found = load_file(place / "expected.safetensors"), answers(model.eval())
        for key, value in expected.items():
            print(place.name, key, f"{(found[key] - value).abs().max():.2e}")


if __name__ == "__main__":
    commands: Mapping[str, Callable[..., None]] = {"make": make, "check": lambda path: check(Path(path))}
    name, *rest = sys.argv[1:] or ["make"]
    commands[name](*rest)

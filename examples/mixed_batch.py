"""Two adapters in one model: keep them in a hub, run a batch whose rows differ, merge them, export one model.

Runs in seconds and offline, on a tiny random BERT; put any Hugging Face model in its place.

    python examples/mixed_batch.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import BertConfig, BertModel

import graftory


def main() -> None:
    """Walk through the Python interface."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertModel(config).eval()
    batch = {"input_ids": torch.randint(0, 99, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    with torch.no_grad():
        bare = model(**batch).last_hidden_state

    with tempfile.TemporaryDirectory() as folder:
        graftory.Hub.create(folder)
        hub = graftory.Hub.open(folder)
        for name, rank in (("small", 4), ("large", 8)):
            fresh = graftory.new_adapter(model, graftory.LoraConfig(rank=rank))
            tensors = {key: torch.randn_like(tensor) / 10 for key, tensor in fresh.tensors.items()}
            print("kept", hub.put(name, graftory.Adapter(fresh.spec, tensors)))
        small, large = hub.get("small@1"), hub.get("large")

    adapted = graftory.attach(model, {"small": small, "large": large})
    with torch.no_grad(), adapted.route(["small", None, {"small": 0.5, "large": 0.5}]):
        mixed = adapted(**batch).last_hidden_state
    for row, who in enumerate(("small", "no adapter", "half of each")):
        print(f"row {row} ({who}): moved by {(mixed[row] - bare[row]).abs().max().item():.4f}")
    taken = adapted.extract("small")
    print("extracted unchanged:", all(torch.equal(taken.tensors[key], small.tensors[key]) for key in small.tensors))
    model = adapted.detach()

    merged = graftory.merge([small, large], method="linear", weights=[0.5, 0.5])
    plain = graftory.export(model, merged).eval()
    with torch.no_grad():
        difference = (plain(**batch).last_hidden_state[2] - mixed[2]).abs().max().item()
    print(f"exported model against the mixture: largest difference {difference:.0e}")
    if difference > 1e-4:
        raise SystemExit("the exported model is not the mixture")


if __name__ == "__main__":
    main()

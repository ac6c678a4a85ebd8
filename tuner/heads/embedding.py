"""Turns a text into a vector of length one. The probe holds the vectors.

Shapes: M texts, T tokens, D hidden.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tuner.objective import in_turn
from tuner.passes import in_passes
from tuner.source import POOLINGS

AUTO = "AutoModel"
Pooling = Literal["mean", "cls", "last"]
# Two vectors whose cosine is above this find the same neighbours.
SAME = 0.999


def opened(model: Any) -> None:
    """Drop the pooler that some encoders carry for next-sentence prediction: no vector comes from it, so it would learn nothing."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def collate(texts: list[list[int]], pad_id: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (M, T), padded on the right."""
    longest = max(map(len, texts))
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in texts], device=device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts], device=device),
    }


def embed(model: Any, batch: dict[str, Tensor], pooling: Pooling) -> Tensor:
    """(M, D) in float32, each of length one: the mean over a text's tokens, or its first or last token's hidden state."""

    def pooled(part: dict[str, Tensor]) -> Tensor:
        mask_MT = part["attention_mask"]
        hidden_MTD = model(input_ids=part["input_ids"], attention_mask=mask_MT).last_hidden_state.float()
        if pooling == "mean":
            mean_MD: Tensor = (hidden_MTD * mask_MT[..., None]).sum(1) / mask_MT.sum(1, keepdim=True)
            return mean_MD
        place_M = mask_MT.sum(1) - 1 if pooling == "last" else torch.zeros(len(mask_MT), dtype=torch.long, device=mask_MT.device)
        at_place_MD: Tensor = hidden_MTD[torch.arange(len(hidden_MTD), device=hidden_MTD.device), place_M]
        return at_place_MD

    return normalize(in_passes(model, batch, pooled), dim=-1)


def vectors(model: Any, texts: list[list[int]], pooling: Pooling, device: str) -> Tensor:
    """(M, D) on the CPU, in the order of the texts."""
    # No padding token is needed: what it stands for is masked.
    found: dict[int, Tensor] = {}
    for chosen in in_turn([len(text) for text in texts]):
        with torch.inference_mode():
            part_MD = embed(model, collate([texts[index] for index in chosen], 0, device), pooling).cpu()
        found.update(zip(chosen, part_MD, strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


def record(model: Any, tokenizer: Any, questions: list[dict[str, Any]], answer_tokens: int) -> list[dict[str, Any]]:  # noqa: ARG001 - a head's common signature
    """Each question {"ids", "text", "pooling"} with its `vector`."""
    answers = ask(model, questions, str(model.device))
    return [
        {**question, "vector": [round(value, 6) for value in answer["vector"]]}
        for question, answer in zip(questions, answers, strict=True)
    ]


def ask(model: Any, items: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """For each item its `vector` now."""
    rows_MD = vectors(model, [item["ids"] for item in items], items[0]["pooling"], device)
    return [{"vector": row_D.tolist()} for row_D in rows_MD]


def difference(item: dict[str, Any], answer: dict[str, Any]) -> tuple[list[float], list[bool]]:
    """Per text: the largest difference of a component, and whether the vectors point the same way."""
    old_D, new_D = torch.tensor(item["vector"]), torch.tensor(answer["vector"])
    return [float((old_D - new_D).abs().max())], [float(old_D @ new_D) > SAME]


def describe(folder: Path, serving: dict[str, Any]) -> None:
    """Add what sentence-transformers and vLLM read beside a checkpoint: how its hidden states become a vector."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    config = json.loads((folder / "config.json").read_text())
    width = config.get("hidden_size") or config.get("dim") or config.get("n_embd")
    for name, value in {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{mode: kind == serving["pooling"] for kind, mode in POOLINGS.items()},
        },
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    (folder / "2_Normalize").mkdir(exist_ok=True)

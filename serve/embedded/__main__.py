"""`python -m serve.embedded --model DIR --name NAME --uds PATH`: serves one bundle, and adapters of it, with transformers."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tuner.bundle import Bundle, open_bundle

AUTO = {
    "causal": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}


def main() -> int:
    """Load, listen, and serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--adapter", action="append", nargs=2, default=[], metavar=("NAME", "DIR"))
    asked = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    import uvicorn

    from serve.embedded.app import application

    served = load(asked.name, open_bundle(asked.model), dict(asked.adapter), asked.max_tokens, asked.dtype)
    config = uvicorn.Config(application(served), uds=asked.uds, log_level="warning", timeout_graceful_shutdown=10, lifespan="off")
    uvicorn.Server(config).run()
    return 0


def load(name: str, bundle: Bundle, adapters: dict[str, str], max_tokens: int, dtype: str) -> Any:
    """The bundle's model and tokenizer, ready to answer. Raises EngineError for a state that cannot be batched."""
    import torch
    import transformers

    from serve.embedded.generation import Generator
    from serve.embedded.reading import Reader
    from serve.embedded.served import Served

    manifest = bundle.manifest
    folder = str(bundle.path.resolve())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, AUTO[str(manifest.head)]).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    vocabulary = model.get_input_embeddings().num_embeddings
    labels = [str(each) for each in manifest.serving.get("labels") or []]
    if manifest.head != "causal":
        reader = Reader(model, str(manifest.head), str(manifest.serving.get("pooling", "mean")))
        return Served([name], tokenizer, max_tokens, frozenset(), reader, labels, vocabulary)
    named = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    if adapters:
        from peft import PeftModel

        for each, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, adapter_name=each)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=each).eval()
        model.eval()
    generator = Generator(model, tuple(adapters))
    from llguidance.hf import from_tokenizer

    try:
        guide: Any = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends))
    except ValueError as error:
        guide = error
    return Served([name, *adapters], tokenizer, max_tokens, frozenset(ends), generator, labels, vocabulary, guide)


if __name__ == "__main__":
    sys.exit(main())

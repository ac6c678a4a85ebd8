"""Bundles that tests of the endpoint share."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import chat_rows, tuner, write_rows


@pytest.fixture(scope="session")
def bundles(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of one small model that answer differently, and what each is merged into."""
    folder = tmp_path_factory.mktemp("bundles")
    write_rows(folder / "train.jsonl", chat_rows(48))
    write_rows(folder / "heldout.jsonl", chat_rows(8, start=100))
    found = {}
    for name, seed in (("a", 1), ("b", 2)):
        recipe = {
            "model": str(tiny_model),
            "seed": seed,
            "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
            "stages": [
                {
                    "tune": {
                        "task": {"kind": "sft", "max_tokens": 128}, "method": {"kind": "lora", "rank": 4},
                        "steps": 16 * seed, "learning_rate": 0.02,
                    }
                },
                {"merge": {}},
            ],
            "probe": {"rows": 3, "answer_tokens": 6},
            "serve": {"max_tokens": 200},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        done = tuner("run", folder / f"{name}.yaml", "--out", folder / name)
        assert done.returncode == 0, done.stderr
        found |= {f"{name}-{stage}": folder / name / stage for stage in ("tune", "merge")}
    return found

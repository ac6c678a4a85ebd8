"""Entities and their F1 against seqeval, on tags drawn by chance: broken BIO sequences, which models do write, among them."""

import random

import pytest

from tuner.tasks.tokens import entities, entity_f1

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


def drawn(draw: random.Random, sentences: int) -> list[list[str]]:
    return [[draw.choice(TAGS) for _ in range(draw.randrange(1, 12))] for _ in range(sentences)]


def changed(draw: random.Random, truth: list[list[str]]) -> list[list[str]]:
    return [[tag if draw.random() < 0.8 else draw.choice(TAGS) for tag in row] for row in truth]


@pytest.mark.parametrize("seed", range(20))
def test_entities_and_their_f1_are_seqevals(seed: int) -> None:
    from seqeval.metrics import f1_score
    from seqeval.metrics.sequence_labeling import get_entities

    draw = random.Random(seed)
    truth = drawn(draw, 40)
    guesses = changed(draw, truth)
    for row in [*truth, *guesses]:
        assert entities(row) == get_entities(row)
    wanted = f1_score(truth, guesses)
    assert 0.2 < wanted < 0.9
    assert entity_f1(truth, guesses) == pytest.approx(wanted, abs=5e-5)  # ours is rounded to four places

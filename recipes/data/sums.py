"""Rows from a function, for recipes/smollm2-sources.yaml: sums of two numbers, as a question and its answer."""

import random
from collections.abc import Iterator


def rows(count: int) -> Iterator[dict[str, str]]:
    """So many different sums of numbers below a hundred. The draw is seeded: a run that goes on must meet the same rows."""
    for number in random.Random(0).sample(range(10_000), count):
        one, other = divmod(number, 100)
        yield {"instruction": f"What is {one} + {other}?", "output": str(one + other)}

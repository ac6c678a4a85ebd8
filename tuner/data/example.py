"""What a task makes of a record: tokens, and which of them are learned."""

from dataclasses import dataclass

# The label of a token that is read but not learned (torch.nn.functional.cross_entropy's own convention).
IGNORE = -100


@dataclass(frozen=True)
class Example:
    """Token ids, and for each the same id where the model is to learn it or IGNORE where it is only read."""

    ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """How many tokens are learned. The first has nothing before it to predict it from."""
        return sum(label != IGNORE for label in self.labels[1:])

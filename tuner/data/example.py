"""What a task makes of a record: tokens, and what is to be learned from them."""

from dataclasses import dataclass

# The label of a token that is read but not learned (torch.nn.functional.cross_entropy's own convention).
IGNORE = -100


@dataclass(frozen=True)
class Example:
    """Token ids, and for each the same id where the model is to learn it from those before, or IGNORE where it is only read."""

    ids: list[int]
    labels: list[int]
    cut: bool = False
    """It was longer than the task allows."""

    @property
    def supervised(self) -> int:
        """How many tokens are learned. The first has nothing before it to predict it from."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Packed:
    """Documents that share a row, of which each reads itself alone."""

    documents: list[Example]

    @property
    def ids(self) -> list[int]:
        """All, one after the other."""
        return [token for each in self.documents for token in each.ids]

    @property
    def labels(self) -> list[int]:
        """What is learned; nothing before its own first token predicts a document."""
        return [label for each in self.documents for label in [IGNORE, *each.labels[1:]]]

    @property
    def positions(self) -> list[int]:
        """The place of each token in its document."""
        return [place for each in self.documents for place in range(len(each.ids))]

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return sum(each.supervised for each in self.documents)


@dataclass(frozen=True)
class Tagged:
    """Token ids, and for each the number of the label that belongs there, or IGNORE."""

    ids: list[int]
    labels: list[int]
    cut: bool = False
    """It was longer than the task allows."""

    @property
    def supervised(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Labelled:
    """Token ids, and what the whole of them is: the number of a class, a 0 or 1 for each class, or one number."""

    ids: list[int]
    target: list[float]
    """What is learned of it."""
    weight: float = 1.0
    """How much it counts, by its class."""
    cut: bool = False
    """It was longer than the task allows."""

    @property
    def supervised(self) -> float:
        """Its weight, so that a weighted sum is divided by the sum of the weights, as torch does."""
        return self.weight


@dataclass(frozen=True)
class Texts:
    """Token ids of texts that are compared with each other: an anchor, its positive, its negatives; or two with a score."""

    texts: list[list[int]]
    score: float | None = None
    cut: bool = False
    """One of them was longer than the task allows."""
    supervised: float = 1.0

    @property
    def ids(self) -> list[int]:
        """All, one after the other."""
        return [token for text in self.texts for token in text]


def repeated(names: list[str]) -> str | None:
    """The first of the names that stands there a second time."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)

"""The labels of whole texts by their names: `/v1/classify`. An engine gives probabilities, and of several labels names only one."""

from typing import Any

from serve.version import Version

MULTI = "multi_label_classification"


def asks(asked: dict[str, Any], version: Version) -> dict[str, Any]:  # noqa: ARG001 - a translation's common signature
    """The body for the engine."""
    return asked


class Telling:
    """The answer."""

    def __init__(self, asked: dict[str, Any], version: Version) -> None:  # noqa: ARG002 - a translation's common signature
        self._names = [str(each) for each in version.bundle.manifest.serving.get("labels") or []]
        self._problem = version.bundle.manifest.probe[0].get("problem")

    def whole(self, told: dict[str, Any]) -> dict[str, Any]:
        """For each text `probs`, the likeliest `label`, and `labels`: those that apply, with their probability.

        Of a model that gives a number, that number is `score`.
        """
        return {**told, "data": [self._entry(each) for each in told["data"]]}

    def _entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        values = entry["probs"]
        if self._problem == "regression":
            return {**{key: value for key, value in entry.items() if key != "label"}, "score": values[0]}
        names = self._names if len(self._names) == len(values) else [str(index) for index in range(len(values))]
        best = values.index(max(values))
        chosen = [index for index, value in enumerate(values) if value > 0.5] if self._problem == MULTI else [best]
        return {**entry, "label": names[best], "labels": [{"label": names[index], "score": values[index]} for index in chosen]}

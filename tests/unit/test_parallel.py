"""What processes share."""

from typing import Any

import pytest
import torch

from tuner.parallel import Parallel


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", range(8))
def test_each_process_asks_as_often_as_the_others_and_all_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, count: int, rows: int
) -> None:
    given, asked = list(range(rows)), [list[int]() for _ in range(count)]
    one = object.__new__(Parallel)
    one.count = count

    def work(own: list[int]) -> list[int]:
        asked[one.index] = own
        return [10 * each for each in own]

    def gathered(found: list[Any], own: list[int]) -> None:
        last = one.index == count - 1  # only then the others have been here
        found[:] = [[10 * each for each in share] for share in asked] if last else [own] * count
        assert found[one.index] == own

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    for index in range(count):
        one.index = index
        found = one.shared(work, given)
    assert found == [10 * each for each in given]
    assert {len(share) for share in asked[: count if rows else 1]} == {-(-rows // count)}
    assert {each for share in asked for each in share} == set(given)

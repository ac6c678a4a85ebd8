"""What is said of long work where there is no terminal."""

import pytest

from tuner import progress


def test_a_log_has_a_line_a_minute_with_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.track("training", 300, done=100) as advance:
        for _ in range(130):
            now += 1
            advance(note="loss 2.000")
    # 60 of the 200 that were left took a minute, so 140 take 2.3; after two minutes 80 take 1.3.
    assert capsys.readouterr().err.splitlines() == [
        "training: 160 of 300, about 2 min left; loss 2.000",
        "training: 220 of 300, about 1 min left; loss 2.000",
    ]
    with progress.track("rows", None) as advance:
        now += 61
        advance(100)
    assert capsys.readouterr().err == "rows: 100\n"

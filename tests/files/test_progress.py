"""Progress without a terminal: a line now and then."""

import pytest

from opt_megatron.files import ProgressLines, progress, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `progress` sees; a list of one number."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_line_every_thirty_seconds(capsys, clock):
    with progress_bar("writing", unit="B", unit_scale=True, total=4_000_000) as bar:
        for _ in range(4):
            clock[0] += 20
            bar.update(1_000_000)
    lines = [
        "writing: 2.00M of 4.00M (50%), 50.0kB/s, 00:40 left",
        "writing: 4.00M of 4.00M (100%), 50.0kB/s, 00:00 left",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_without_a_total_and_hidden(capsys, clock):
    with progress_bar("generating", unit=" tokens") as bar, progress_bar("x", unit="B", hidden=True) as hidden:
        clock[0] += 31
        bar.update(62)
        hidden.update(1)
        bar.clear()
    assert isinstance(bar, ProgressLines)
    assert capsys.readouterr().err == "generating: 62 tokens  2.00 tokens/s\n"

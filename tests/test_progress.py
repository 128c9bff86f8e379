"""models/progress.py: a bar on a terminal, a line a minute elsewhere."""

import pytest
from tqdm import tqdm

from models import progress as module
from models.progress import Lines, progress


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the module, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_gets_a_bar_and_a_quiet_loop_nothing(monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress([1, 2], "two"), tqdm)
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress([1, 2], "two"), Lines)
    assert list(progress([1, 2], "two", disable=True)) == [1, 2]
    assert "\r" not in capsys.readouterr().err.splitlines()[-1:]


def test_a_line_a_minute_with_the_time_left(clock, capsys):
    items = []
    for item in progress(range(10), "score", unit="image", leave=False, delay=2):
        items.append(item)
        clock[0] += 25
    assert items == list(range(10))
    # After 75, 150 and 225 seconds, 25 for each image
    assert capsys.readouterr().err.splitlines() == [
        "score: 3 of 10 images, about 0:02:55 left", "score: 6 of 10 images, about 0:01:40 left",
        "score: 9 of 10 images, about 0:00:25 left"]


def test_a_resumed_count_and_one_without_a_total(clock, capsys):
    with progress(desc="cache", total=8, initial=4, unit="image") as bar:
        clock[0] += 70
        bar.update(2)
    with progress(desc="walk", unit="file") as bar:
        clock[0] += 70
        bar.update(5)
    assert capsys.readouterr().err.splitlines() == [
        "cache: 6 of 8 images, about 0:01:10 left", "walk: 5 files"]


def test_a_short_loop_prints_nothing(clock, capsys):
    assert list(progress(range(3), "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""

"""What a log shows of long steps: a line every ten seconds, never an empty one."""

import io
import re
import sys

import pytest

from pipeline import progress
from pipeline.predictions import shown
from pipeline.progress import Lines, Progress, TrainingProgress, track
from posepress.predict import Watch


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def log():
    """A pace whose stream is no terminal and whose clock stands."""
    return Lines(io.StringIO(), Clock())


def written(lines):
    return lines.stream.getvalue().splitlines()


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(log):
    for _ in track(range(14), "calibrating", unit="images", lines=log):
        log.clock.now += 3
    assert written(log) == [
        "           calibrating: 4 of 14, 0.33 images/s",
        "           calibrating: 8 of 14, 0.33 images/s",
        "           calibrating: 12 of 14, 0.33 images/s",
        "           calibrating: 14 of 14, 0.33 images/s",
    ]


def test_short_steps_say_nothing_and_share_one_pace(log):
    for step in range(5):
        for _ in track(range(4), f"step {step}", lines=log):
            log.clock.now += 1
    assert written(log) == ["           step 2: 2 of 4, 1.0 a second", "           step 2: 4 of 4, 1.0 a second"]


def test_a_step_that_was_broken_off_says_where(log):
    def drawn():
        for n in range(30):
            log.clock.now += 0.5
            yield n
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(track(drawn(), "drawing", 100, "images", lines=log))
    assert written(log) == ["           drawing: 20 of 100, 2.0 images/s", "           drawing: 30 of 100, 2.0 images/s"]


def test_a_thing_that_takes_long_is_no_silence(log):
    with Progress("timing", unit="s", lines=log) as bar:
        log.clock.now += 11
        bar.tick()
        bar.tick()
    assert written(log) == ["           timing: 11 s"]


def test_a_line_comes_by_itself_where_nothing_is_done_for_long(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    stream = io.StringIO()
    lines = Lines(stream)
    with Progress("building", 1, lines=lines):
        for _ in range(2000):
            if stream.getvalue():
                break
            progress.time.sleep(0.01)
    assert "building: 0 of 1\n" in stream.getvalue()


def test_what_is_not_known_is_not_said(log):
    with Progress("reading", lines=log, stays=True) as bar:
        bar.advance()
    with Progress("reading", lines=log, stays=True):
        pass
    with Progress("reading", 3, lines=log, shown=False, stays=True) as bar:
        log.clock.now += 30
        bar.update(3)
        bar.say("nothing")
    assert written(log) == ["           reading: 1"]


def test_a_training_says_its_rate_since_the_last_line_and_its_losses(log):
    with TrainingProgress(True, 1000, 8, 0, log) as bar:
        bar.begin(0)
        for step in range(1, 61):
            log.clock.now += 2.5 if step <= 20 else 0.5
            bar.update(step)
            if step % 20 == 1:
                bar.show_losses(step, {"heatmaps": 1 / step}, 20)
        bar.say_rate(60)
    assert [line.strip() for line in written(log)] == [
        "step 4 of 1000, 3 images/s, heatmaps 1.000",
        "step 8 of 1000, 3 images/s, heatmaps 1.000",
        "step 12 of 1000, 3 images/s, heatmaps 1.000",
        "step 16 of 1000, 3 images/s, heatmaps 1.000",
        "step 20 of 1000, 3 images/s, heatmaps 1.000",
        "step 40 of 1000, 16 images/s, heatmaps 0.048",
        "step 60 of 1000, 16 images/s, heatmaps 0.024",
        "step 60 of 1000, 7 images/s, heatmaps 0.024",
    ]


def test_a_pass_over_images_says_what_held_it_up(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINES", Lines())  # whatever ran before in this process
    watch = Watch({"network": 1}, {"network": 1.0})
    assert list(shown(iter("abc"), watch, "tune images", 3)) == ["a", "b", "c"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("           tune images: 3 of 3, ")
    assert line.endswith(" images/s, held up by network")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_of_a_step_within_a_bar_is_printed_above_the_bar(monkeypatch, log):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Lines(Terminal(), Clock())
    with Progress("outer", 2, lines=terminal), Progress("inner", 2, lines=terminal) as inner:
        inner.say("a [line]")
        with Progress("logged", 2, lines=log) as logged:
            logged.say("no terminal")
    assert re.search(r"\x1b\[2K {11}a \[line\]\n.*outer", terminal.stream.getvalue()), "the bar is cleared, and drawn again"
    assert written(log) == ["           no terminal"]


def test_a_terminal_gets_one_bar_and_no_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in track([1, 2], "outer"):
        for _ in track([1, 2], "inner"):
            pass
    assert "outer" in stream.getvalue()
    assert "inner" not in stream.getvalue()
    assert progress._bars == []

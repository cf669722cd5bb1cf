"""Time lines of pipelines are possible ones, and as long as theory says."""

import itertools

import pytest
from helpers import unpadded

from benchmarks import pipeline_page, schedules
from benchmarks.schedules import Times, idle, span

CASES = [(s, m) for s in (1, 2, 4, 8) for m in (1, 3, 8)]
T = Times(2, 3, 4)


@pytest.mark.parametrize(("stages", "parts"), CASES)
def test_spans_of_equal_stages_are_those_of_theory(stages, parts):
    times = [T] * stages
    ticks = parts + stages - 1
    assert span(schedules.gpipe(times, parts)) == ticks * sum(T)
    assert span(schedules.one_forward_one_backward(times, parts)) == ticks * sum(T)
    direct = [Times(2, 0, 4)] * stages
    assert span(schedules.local(direct, parts)) == ticks * 2 + parts * 4
    assert idle(schedules.local(direct, parts), stages) == pytest.approx(
        (stages - 1) * 2 / (ticks * 2 + parts * 4)
    )


@pytest.mark.parametrize("name", schedules.LINES)
@pytest.mark.parametrize("times", [[T] * 4, [Times(1, 2, 1), Times(3, 1, 2), Times(2, 2, 5)]])
def test_no_stage_does_two_things_at_once_and_nothing_comes_before_what_it_needs(name, times):
    line = schedules.LINES[name](times, 5)
    for s in range(len(times)):
        own = sorted((t.start, t.end) for t in line if t.stage == s)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))
    ends = {(t.stage, kind, t.micro_batch): t.end for t in line for kind in t.kind}
    local = name.startswith("local")
    for t in line:
        if t.kind == "F" and t.stage:
            assert t.start >= ends[t.stage - 1, "F", t.micro_batch]
        elif "B" in t.kind and t.stage < len(times) - 1:
            assert t.start >= ends[t.stage + 1, "B", t.micro_batch]
        elif t.kind == "W":
            after = (len(times) - 1, "F") if local else (t.stage, "B")
            assert t.start >= ends[*after, t.micro_batch]


def test_no_more_micro_batches_are_kept_than_there_are_stages():
    for schedule in (schedules.local, schedules.one_forward_one_backward, schedules.zero_bubble):
        line = schedule([T] * 4, 12)
        for at in {t.start for t in line}:
            begun = [t for t in line if t.stage == 0 and t.kind == "F" and t.start <= at]
            done = [t for t in line if t.stage == 0 and "W" in t.kind and t.end <= at]
            assert len(begun) - len(done) <= 4


def test_a_zero_bubble_line_is_no_shorter_than_its_bound():
    for stages, parts in CASES:
        times = [T] * stages
        found = span(schedules.zero_bubble(times, parts))
        assert found >= schedules.zero_bubble_bound(times, parts)
        assert found <= span(schedules.gpipe(times, parts))


def test_the_page_has_a_line_for_every_row():
    case = {"model": "mlp", "stages": 2, "micro_batches": 4}
    rows = [
        {"part": "model", **case, **dict.fromkeys(pipeline_page.SCHEDULES, 1.5)},
        {
            "part": "sent", **case, "up": 2**20, "outputs": 0, "bp": 2**21, "walk": 0, "state": 0,
            "whole_state": 2**22, "taped": 0, "streamed": 0, "1F1B": 0, "GPipe": 0,
        },
        {
            "part": "measured", **case, "memory": "taped", "ms_of_one": 3.0, "ms": 2.0,
            "speed_up": 1.5, "modelled": 1.7,
        },
    ]  # fmt: skip
    record = {"rows": rows, "hardware": "x", "versions": {}, "commit": "c"}
    page = unpadded(pipeline_page.pipeline(record))
    assert "| mlp, 2 stages | 4 | 1.50 | 1.50 |" in page
    assert "| mlp, 2 stages | 4 | 1.00 | 0.00 | 2.00 |" in page
    assert "| taped | 4 | 3 | 2 | 1.50 | 1.70 |" in page

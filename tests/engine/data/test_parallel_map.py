import operator
from functools import partial

import pytest

from engine.data import parallel_map
from engine.data.parallel_map import map_over_processes, map_serially

DOUBLE = partial(operator.mul, 2)


@pytest.mark.parametrize("in_processes", [False, True])
def test_results_are_the_same_in_any_process(monkeypatch: pytest.MonkeyPatch, in_processes: bool) -> None:
    monkeypatch.setattr(parallel_map, "PROCESS_START_S", -1 if in_processes else float("inf"))
    items = list(range(8))
    results = list(map_over_processes(DOUBLE, int, DOUBLE, items, [1.0] * len(items)))
    assert sorted(results) == [2 * item for item in items] == list(map_serially(DOUBLE, int, DOUBLE, items, [1.0] * 8))


def test_an_error_of_a_worker_process_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_map, "PROCESS_START_S", -1)
    fail = partial(operator.truediv, 1)
    with pytest.raises(ZeroDivisionError):
        list(map_over_processes(fail, int, fail, [1, 2, 0, 3], [1.0] * 4))

"""Which cases of a test are in the default run: what ``@pytest.mark.cases(n)`` keeps of them."""

import pytest


class Case:
    """What the collection hook asks of an item, and the marks that it adds."""

    def __init__(self, name: str, *marks: pytest.MarkDecorator) -> None:
        self.path, self.originalname, self.marks = "tests/test_x.py", name, [m.mark for m in marks]

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((m for m in self.marks if m.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


@pytest.fixture
def kept(request):
    """Indices of the cases that stay in the default run, once the project's hook has seen them."""
    (hooks,) = (p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "_spread"))

    def run(cases: list[Case]) -> list[int]:
        hooks._spread(cases)
        out = ("slow", "thorough")
        return [i for i, case in enumerate(cases) if not any(case.get_closest_marker(name) for name in out)]

    return run


@pytest.mark.parametrize(
    ("count", "cases", "want"),
    [(1, 5, [0]), (2, 5, [0, 4]), (3, 5, [0, 2, 4]), (3, 8, [0, 4, 7]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 1, 2])],
)
def test_so_many_cases_stay_spread_evenly(kept, count, cases, want):
    assert kept([Case("test_a", pytest.mark.cases(count)) for _ in range(cases)]) == want


def test_slow_cases_take_no_places(kept):
    """They are not in the default run; else a test whose slow cases come first would have none there."""
    mark = pytest.mark.cases(2)
    cases = [Case("test_a", mark, *([pytest.mark.slow] if i < 3 else [])) for i in range(6)]
    assert kept(cases) == [3, 5]
    assert not any(case.get_closest_marker("thorough") for case in cases[:3])


def test_each_test_is_counted_by_itself_and_one_without_the_mark_keeps_all(kept):
    names = ["test_a", "test_b", "test_plain"] * 3
    cases = [Case(name, *([] if name == "test_plain" else [pytest.mark.cases(1)])) for name in names]
    assert kept(cases) == [0, 1, 2, 5, 8]

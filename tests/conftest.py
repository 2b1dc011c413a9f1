"""Fixtures that several test files share, and the count of what the fault matrix ran."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOAK = os.environ.get("SARFM_SOAK") == "1"  # the long form: `make soak`

ROWS = {  # number: hazard, cases of the quick form, cases of the long form
    1: ("kill -9 in training, resume", 9, 200),
    2: ("kill -9 while a checkpoint is saved", 15, 100),
    3: ("kill -9 while a store is prepared", 10, 60),
    4: ("damaged inputs", 160, 4000),
    5: ("NaN, infinite, empty and constant tiles", 1000, 10000),
    6: ("fork after open", 2400, 24000),
    7: ("disk full", 10, 30),
    8: ("downloads that break", 10, 100),
    9: ("files that would run code", 30, 30),
    10: ("bit-rot in checkpoints", 100, 1000),
    11: ("names and archives that lead out", 40, 40),
    12: ("hostile text in HTML", 25, 25),
    13: ("injection through parameters", 20, 20),
    14: ("kernel killed, cell error, Ctrl-C", 5, 20),
    16: ("seeds and workers", 4000, 40000),
    17: ("two writers", 20, 200),
    18: ("scenes larger than memory", 12, 12),
    24: ("one scene written in many ways", 100, 2000),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what takes minutes to the long form."""
    for item in items:
        if "soak" in item.keywords and not SOAK:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make soak"))


class Row:
    """Count the cases that a test runs for one row of the matrix."""

    def __init__(self, number: int) -> None:
        self.hazard, quick, long = ROWS[number]
        self.number, self.asked, self.errors = number, long if SOAK else quick, []
        self.told = {"row": number, "cases": None, "failed": 0, "note": ""}

    @contextmanager
    def case(self, name: object = "", cases: int = 1) -> Iterator[None]:
        """Count a block as a case; when it fails, the others still run and the test fails in the end."""
        self.told["cases"] = (self.told["cases"] or 0) + cases
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self.told["failed"] += 1
            self.errors.append(f"{name}: {type(error).__name__}: {error}")

    def note(self, text: str) -> None:
        """Say something about this row in the summary."""
        self.told["note"] = text


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "row(number): counts for this row of the fault matrix; one case without the fixture"
    )


def pytest_runtest_setup(item):
    if marker := item.get_closest_marker("row"):
        item.row = Row(*marker.args)
        item.user_properties.append(("row", item.row.told))


@pytest.fixture
def row(request) -> Row:
    """The row of the fault matrix that the test is marked with."""
    return request.node.row


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    result = yield
    if errors := getattr(getattr(pyfuncitem, "row", None), "errors", []):
        pytest.fail(f"{len(errors)} cases failed\n" + "\n".join(errors[:20]), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter):
    tests = {}
    for report in (r for group in terminalreporter.stats.values() for r in group if hasattr(r, "user_properties")):
        for told in (value for name, value in report.user_properties if name == "row"):
            of = tests.setdefault(report.nodeid, {"seconds": 0.0, "skipped": 0, "broken": 0})
            of["seconds"] += report.duration
            of["skipped"] |= report.skipped
            of["broken"] |= report.failed
            if report.when == "call":
                of |= told
            of["row"] = told["row"]
    if not tests:
        return
    terminalreporter.section(f"fault matrix, {'long' if SOAK else 'quick'} form")
    for number, (hazard, quick, long) in ROWS.items():
        of = [t for t in tests.values() if t["row"] == number]
        if not of:
            continue
        run = sum((t.get("cases") or 1) for t in of if not t["skipped"])
        failed = sum(max(t.get("failed", 0), t["broken"]) for t in of)
        notes = [f"{sum(t['skipped'] for t in of)} tests skipped"] * any(t["skipped"] for t in of)
        notes += [t["note"] for t in of if t.get("note")]
        terminalreporter.write_line(
            f"row {number:2}  {hazard:40} {run:6} cases ({long if SOAK else quick} asked), {failed} failed,"
            f" {sum(t['seconds'] for t in of):6.1f} s{'; ' + '; '.join(notes) if notes else ''}"
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real SAR data that is not shipped, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("SARFM_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "README.md").exists():
        pytest.skip(f"no real data in {folder}; set SARFM_SHARED to the folder that holds them")
    return folder

"""A pytest plugin that runs tests of Keras in the scope of a mesh strategy.

Usage, from the root of a checkout (`python3 -m foreign` does both steps for whole folders):

    export PYTHONPATH=.:tests
    python3 -m pytest -c /dev/null -p foreign.keras_under_strategy --record=DIR KERAS_TEST.py
    python3 -m pytest -c /dev/null -p foreign.keras_under_strategy --compare=DIR \
        --strategy=data=2 KERAS_TEST.py

The first command keeps the results of each training call of each test that passes without a
strategy. The second one runs those tests again in the scope of a strategy, and fails a test whose
results differ.
"""

import faulthandler
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

from foreign import missing_modules, recording, reports
from foreign.exceptions import exception_for
from foreign.randomness import fixed_seeds
from foreign.scopes import TestScope, devices_of, make_strategy
from llmos_tf import devices

# Tests of Keras lie below it.
KERAS = Path(keras.__file__).parent / "src"
# Declared by Keras's own conftest.py, which is not in the wheel.
MARKERS = ("requires_trainable_backend", "multi_device")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("strategy")
    group.addoption(
        "--strategy", default="none", help="none, zero1 to zero3, mirrored, or a mesh: data=2"
    )
    group.addoption("--record", metavar="DIR", help="write the results of training calls there")
    group.addoption("--compare", metavar="DIR", help="compare with the results written there")
    group.addoption("--only", metavar="FILE", help="the ids of the tests to run, a line each")
    group.addoption(
        "--report",
        metavar="FILE",
        help="append a line of JSON for each test; tests that have one are not run again",
    )
    group.addoption(
        "--limit", type=float, default=150.0, help="seconds after which a test ends the process"
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Keras")
    count = devices_of(config.getoption("strategy"))
    try:
        devices.configure_virtual_cpus(count)
    except RuntimeError:
        # Another test of this process has started TensorFlow: with enough devices?
        if len(devices.visible_devices()) < count:
            raise
    config.pluginmanager.register(KerasUnderStrategy(config), "keras_under_strategy_run")


class KerasUnderStrategy:
    """The hooks of a run.

    Args:
        config: of pytest.
    """

    def __init__(self, config: pytest.Config):
        self._spec = config.getoption("strategy")
        self._record, self._compare = (
            Path(folder) if (folder := config.getoption(name)) else None
            for name in ("record", "compare")
        )
        self._limit = config.getoption("limit")
        # Pytest captures standard error, and what it has captured is lost with the process.
        self._stderr = os.dup(2)
        path = config.getoption("report")
        self._reports = reports.Reports(Path(path) if path else None)
        # Strategies patch Keras when the first one is created: record what the user calls.
        make_strategy(self._spec)
        trainer = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))
        self._recorder = recording.Recorder(trainer)
        self._recorder.install()

    def pytest_unconfigure(self) -> None:
        self._recorder.remove()
        os.close(self._stderr)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """Lets files be imported whose frameworks are not installed; tests that need them fail."""
        if not isinstance(collector, pytest.Module):
            return (yield)
        with missing_modules.stand_ins():
            report = yield
        if report.failed:
            self._reports.add_file(_path_of(collector), str(report.longrepr))
        return report

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        path, chosen, dropped = config.getoption("only"), [], []
        only = set(Path(path).read_text(encoding="utf-8").splitlines()) if path else None
        for item in items:
            test = id_of(item)
            known = self._compare is None or _file(self._compare, test).exists()
            wanted = only is None or test in only
            (chosen if known and wanted and not self._reports.has(test) else dropped).append(item)
        items[:] = chosen
        config.hook.pytest_deselected(items=dropped)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._reports.begin(id_of(item))
        self._recorder.begin_test()
        faulthandler.dump_traceback_later(self._limit, exit=True, file=self._stderr)
        try:
            with TestScope(self._spec), fixed_seeds():
                return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        """Judges a test. Outermost: what `unittest` has caught is known when its hook is done."""
        report = yield
        test, found = id_of(item), []
        if report.when == "call" and self._compare is not None:
            expected = recording.load(_file(self._compare, test))
            found = recording.differences(expected, self._recorder.calls)
        if report.when == "call" and self._record is not None and report.passed:
            recording.save(_file(self._record, test), self._recorder.calls)
        if report.passed and found:
            report.outcome = "failed"
            report.longrepr = "\n".join(["other results than on one device:", *found])
        reason = exception_for(test)
        if report.failed and reason and self._spec != "none":
            report.outcome, report.wasxfail = "skipped", reason
        self._reports.add(test, report, call.excinfo, found)
        return report


def id_of(item: pytest.Item) -> str:
    """Returns the id of a test that does not depend on where Keras is installed."""
    return "::".join((_path_of(item), *item.nodeid.split("::")[1:]))


def _path_of(node: pytest.Item | pytest.Collector) -> str:
    inside = node.path.is_relative_to(KERAS)
    return node.path.relative_to(KERAS).as_posix() if inside else node.path.name


def _file(folder: Path, test: str) -> Path:
    return folder / f"{hashlib.sha256(test.encode()).hexdigest()[:32]}.pickle"

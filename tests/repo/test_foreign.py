"""The tool that runs Keras's tests under strategies (`tests/foreign/`) finds what differs."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from foreign import keras_under_strategy, recording, tables
from foreign.exceptions import EXCEPTIONS, exception_for
from foreign.missing_modules import stand_ins
from foreign.processes import Run
from foreign.processes import test_files as files_of
from foreign.reports import read

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]

# A test in the manner of Keras: it clears the session, and checks no numbers. Under a strategy,
# which it still has to see after that, the model is another one.
PLANTED = """
    import unittest
    import keras
    import numpy as np
    import tensorflow as tf

    class SomeTest(unittest.TestCase):
        def setUp(self):
            keras.utils.clear_session()

        def predict(self, weight):
            model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            model.set_weights([np.full((2, 1), weight), np.zeros(1)])
            with self.assertRaises(ValueError):
                model.predict_on_batch(None)

        def test_different(self):
            self.predict(1.001 if tf.distribute.has_strategy() else 1.0)

        def test_equal(self):
            self.predict(1.0 + 1e-7 * tf.distribute.has_strategy())

        def test_broken(self):
            raise ValueError("also without a strategy")
"""


@pytest.mark.fast
def test_a_planted_difference_is_found(pytester, monkeypatch):
    # Fails when recordings are not compared, the scope is lost in clear_session, or tests that
    # fail on one device are not left out.
    # Each run would import all plugins that are installed: seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = pytester.makepyfile(PLANTED)
    plugin = ("-p", keras_under_strategy.__name__, "-p", "no:cacheprovider")
    pytester.inline_run(file, *plugin, "--record=results").assertoutcome(passed=2, failed=1)
    compared = ("--compare=results", "--strategy=data=2", "--report=report.jsonl")
    pytester.inline_run(file, *plugin, *compared).assertoutcome(passed=1, failed=1)
    lines = {line["test"].rpartition("::")[2]: line for line in read(Path("report.jsonl"))}
    assert lines["test_equal"]["outcome"] == "passed"
    assert lines["test_different"]["outcome"] == "failed"
    (difference,) = lines["test_different"]["differences"]
    assert difference.startswith("call 1 (predict_on_batch): weights[0] differs by 1.0e-03")
    assert tables.failed(list(lines.values())) == [lines["test_different"]]
    # Those tests have a report: they are not run again.
    pytester.inline_run(file, *plugin, *compared).assertoutcome(passed=0, failed=0)


def call(method="fit", raised=None, result=(1.0,), weights=((1.0, 2.0),)):
    arrays = [[np.asarray(x, np.float32) for x in values] for values in (result, weights)]
    return {"method": method, "raised": raised, "result": arrays[0], "weights": arrays[1]}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"weights": [(1.0, 2.00001)]}, None),
        ({"weights": [(1.0, 2.0001)]}, "weights[0] differs by 1.0e-04"),
        ({"weights": [(1.0, np.nan)]}, "weights[0] has NaN or infinite elements"),
        ({"weights": [(1.0, 2.0, 3.0)]}, "weights[0] has the shape (3,) instead of (2,)"),
        ({"weights": []}, "weights has 0 values instead of 1"),
        ({"result": [1.1]}, "result[0] differs by 1.0e-01"),
        ({"method": "predict"}, "method is predict instead of fit"),
        ({"raised": "ValueError"}, "raised is ValueError instead of None"),
    ],
)
def test_calls_are_compared(changed, expected):
    # Fails when a kind of difference is not seen, or rounding errors are taken for one.
    lines = recording.differences([call()], [call(**changed)])
    assert len(lines) == (expected is not None)
    assert all(line.startswith(f"call 1 (fit): {expected}") for line in lines)
    assert recording.differences([call()], []) == ["0 calls instead of 1"]


class Trainer:
    """Has the methods of Keras's trainer. `fit` calls `evaluate`."""

    weights = ()

    def fit(self):
        return {"loss": [1.0], "val_loss": [self.evaluate()]}

    def evaluate(self):
        return 2.0

    def predict(self):
        raise ValueError

    train_on_batch = test_on_batch = predict_on_batch = predict


@pytest.mark.fast
def test_outermost_calls_are_recorded():
    # Fails when `evaluate` inside of `fit` is recorded as well, an exception is forgotten, or the
    # methods stay wrapped.
    methods = dict(vars(Trainer))
    recorder = recording.Recorder(Trainer)
    recorder.install()
    recorder.begin_test()
    Trainer().fit()
    Trainer().evaluate()
    with pytest.raises(ValueError):
        Trainer().predict()
    recorder.remove()
    assert [call["method"] for call in recorder.calls] == ["fit", "evaluate", "predict"]
    assert recorder.calls[0]["result"] == ["loss", 1.0, "val_loss", 2.0]
    assert recorder.calls[2]["raised"] == "ValueError"
    assert dict(vars(Trainer)) == methods


@pytest.mark.fast
def test_exceptions_have_reasons():
    # Fails when a pattern does not fit the ids, or an exception has no reason.
    assert exception_for("a_test.py::A::test_x_1", {"a_test.py::A::test_x_*": "why"}) == "why"
    assert exception_for("a_test.py::A::test_y", {"a_test.py::A::test_x_*": "why"}) is None
    assert all(reason.strip() for reason in EXCEPTIONS.values())
    files = {file.as_posix() for file in files_of(["."])}
    for pattern in EXCEPTIONS:
        assert any(file.endswith(pattern.partition("::")[0]) for file in files), pattern


@pytest.mark.fast
def test_missing_frameworks_can_be_imported():
    # Fails when a file that imports such a framework at its top has no tests, or a stand-in stays.
    with stand_ins(("no_such_framework",)):
        import no_such_framework.part as part  # noqa: PLC0415

        with pytest.raises(ModuleNotFoundError):
            part.anything()
    assert "no_such_framework" not in sys.modules


@pytest.mark.fast
@pytest.mark.parametrize(
    ("statuses", "outcomes", "num_started"),
    [
        ([0], [["passed", "failed"]], 1),
        # Killed in a test; then the last test runs into its time limit.
        ([-9, 1, 5], [["passed", "died"], ["passed", "died"], []], 3),
        ([2], [[]], 1),
    ],
)
def test_a_process_that_died_is_followed_by_another(
    monkeypatch, tmp_path, statuses, outcomes, num_started
):
    # Fails when tests after a crash are not run, a run has no end, or one that cannot start is
    # taken for one without failures.
    run = Run(tmp_path, "record", limit=1.0, together=2)
    started = []

    def process(files):
        number = len(started)
        started.append(files)
        with run.path.open("a", encoding="utf-8") as file:
            for i, outcome in enumerate(outcomes[number]):
                file.write(json.dumps({"test": f"{number}.{i}", "outcome": outcome}) + "\n")
        return statuses[number]

    monkeypatch.setattr(run, "_status_of_process", process)
    refusal = pytest.raises(RuntimeError, match="status 2") if statuses == [2] else nullcontext()
    with refusal:
        run._run_together([tmp_path / "a_test.py"])
    assert len(started) == num_started


@pytest.mark.nightly
def test_keras_tests_agree(tmp_path):
    # Fails when the command does not run, or a strategy changes the results of these tests.
    command = [sys.executable, "-m", "foreign", f"--reports={tmp_path}"]
    done = subprocess.run(
        [*command, "--strategies=data=2", "callbacks/terminate_on_nan_test.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""Signals as a wish to stop."""

import os
import signal

import pytest

from llmos_tf.training.interrupt import GracefulStop

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def usual_handler():
    """Python's own, which it does not set in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number, capfd):
    """Fails if a signal ends the program at once, is not seen between two steps, or is taken
    without a word while a step goes on for minutes."""
    with GracefulStop() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == signal.Signals(number).name
        assert f"{stop.requested}: stopping after this step" in capfd.readouterr().err


def test_the_second_signal_acts_as_usual():
    """Fails if a run that hangs in a step cannot be ended from the keyboard."""
    with GracefulStop() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    """Fails if the program around a run loses its own handlers."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with GracefulStop():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(RuntimeError), GracefulStop():
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before

"""What several workers agree on around Keras's loops: the script, its data, and when to stop.

Workers that are not alike wait for each other for ever, or train copies of the weights that part.
So when `fit`, `evaluate` or `predict` begins, they compare what a script may do differently. In
`fit` one that stops, by `stop_training` or by SIGTERM, stops all after the same step.
"""

import contextlib
import functools
import inspect
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination.watch import Watch
from llmos_tf.strategies.keras_patches.script_facts import data_facts, model_facts

# Arguments of the loops that a worker may have by itself, such as more to print.
_OWN = ("self", "callbacks", "verbose", "return_dict", "kwargs")
_DATA = ("x", "y", "sample_weight", "validation_data")
_SIGTERM_STATUS = 128 + signal.SIGTERM

_log = logging.getLogger("llmos_tf")


@functools.cache
def hook_agreement() -> None:
    """Has workers agree in `fit`, `evaluate` and `predict` of their models, from now on."""
    trainer = _internal.TensorFlowTrainer
    trainer.fit = _agreeing_fit(trainer.fit)
    for name in ("evaluate", "predict"):
        setattr(trainer, name, _agreeing(getattr(trainer, name)))


def _watch_of(model: Any) -> Watch | None:
    return getattr(getattr(model, "distribute_strategy", None), "watch", None)


def _agreeing_fit(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(model, *args, **kwargs):
        watch = _watch_of(model)
        if watch is None:
            return original(model, *args, **kwargs)
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        watch.agreement.require_same(
            "model and arguments of fit", _facts(arguments) | model_facts(model)
        )
        # The order in which rows are shuffled is drawn here, after what was drawn until now.
        watch.agreement.share_random_state()
        together = _Together(watch)
        given = arguments["callbacks"]
        if isinstance(given, keras.callbacks.CallbackList):
            together.others = list(given.callbacks)
            given.append(together)
        else:
            together.others = [] if given is None else tf.nest.flatten(given)
            arguments["callbacks"] = [*together.others, together]
        with watch.at("in fit"), _reported(watch), _noted_sigterm(together):
            return original(*bound.args, **bound.kwargs)

    return fit


def _agreeing(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def loop(model, *args, **kwargs):
        watch = _watch_of(model)
        if watch is None or watch.position.startswith("in "):
            # `fit` validates by `evaluate`.
            return original(model, *args, **kwargs)
        bound = signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        watch.agreement.require_same(f"arguments of {original.__name__}", _facts(bound.arguments))
        with watch.at(f"in {original.__name__}"), _reported(watch):
            return original(model, *args, **kwargs)

    return loop


def _facts(arguments: dict[str, Any]) -> dict[str, str]:
    """What the workers compare of the arguments of a loop."""
    facts = {}
    for name, value in arguments.items():
        if name in _DATA:
            facts |= data_facts(name, value)
        elif name not in _OWN and name != next(iter(arguments)):
            facts[name] = repr(value)
    return facts


@contextlib.contextmanager
def _reported(watch: Watch) -> Iterator[None]:
    """Has the other workers fail with the error of a step that fails in this one."""
    try:
        yield
    except tf.errors.OpError as error:
        watch.report(error)
        raise


@contextlib.contextmanager
def _noted_sigterm(together: "_Together") -> Iterator[None]:
    """Has SIGTERM end `fit` after a step, in all workers, unless the script has a handler."""
    is_free = signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None)
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, together.note_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if together.signalled:
        # After the last step.
        os.kill(os.getpid(), signal.SIGTERM)


class _Together(keras.callbacks.Callback):
    """Stops all workers after the same step, where one wants to. The last of the callbacks."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.others: list[Any] = []
        self.signalled = False
        self._watch = watch
        self._stops = False
        self._steps = 0

    def note_signal(self, number: int, frame: Any) -> None:
        """Notes SIGTERM until the step has ended."""
        del number, frame
        self.signalled = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._steps = 0
        self._watch.stop.begin()
        self._watch.position = f"in epoch {epoch + 1} of fit, after 0 steps"

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self._steps += 1
        place = self._watch.position.partition(",")[0]
        self._watch.position = f"{place}, after {self._steps} steps"
        self._stops |= self.model.stop_training
        if self.signalled or self._stops:
            self._watch.stop.ask(json.dumps({"sigterm": self.signalled, "stop": True}))
        reason = self._watch.stop.after_step()
        self.model.stop_training = reason is not None
        if reason is not None:
            self._follow([json.loads(reason)])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._watch.position = f"at the end of epoch {epoch + 1} of fit, after {self._steps} steps"
        self._stops |= self.model.stop_training
        mine = json.dumps({"sigterm": self.signalled, "stop": self._stops})
        agreement = self._watch.agreement
        found = agreement.from_all(mine, f"end epoch {epoch + 1} of fit", agreement.limit)
        self._follow([json.loads(one) for one in found])

    def _follow(self, wishes: list[dict[str, bool]]) -> None:
        if any(wish["sigterm"] for wish in wishes):
            self._save_and_end()
        self.model.stop_training = any(wish["stop"] for wish in wishes)

    def _save_and_end(self) -> None:
        """What SIGTERM in one worker does in each."""
        backups = [c for c in self.others if isinstance(c, keras.callbacks.BackupAndRestore)]
        for callback in backups:
            _internal.save_backup(callback)
        saved = ", ".join(str(callback.backup_dir) for callback in backups)
        _log.warning(
            "SIGTERM: fit ends after the same step in all workers, %s.",
            f"with a backup in {saved}"
            if saved
            else "without a backup (keras.callbacks.BackupAndRestore would save one)",
        )
        raise SystemExit(_SIGTERM_STATUS)

"""Waits until all processes of a cluster can be reached, before TensorFlow joins them.

TensorFlow waits for them in one call that nothing interrupts, not even Ctrl-C. So this looks first
whether they are there, and lets them see that this one is, by a port that listens.
"""

import errno
import logging
import socket
import time
from collections.abc import Sequence

# Seconds after which a wait for other processes is reported, first and then again.
FIRST_NOTICE, NEXT_NOTICE = 5.0, 60.0

_log = logging.getLogger("llmos_tf")


def await_workers(workers: Sequence[str], task: int, timeout: float) -> None:
    """Returns when every other process can be reached.

    Args:
        workers: addresses of all.
        task: index of this process.
        timeout: seconds to wait.

    Raises:
        TimeoutError: some of the others did not start in time.
    """
    missing = {i: address for i, address in enumerate(workers) if i != task}
    start = time.monotonic()
    deadline, notice = start + timeout, start + FIRST_NOTICE
    with _listen(workers[task]):
        while missing:
            missing = {i: one for i, one in missing.items() if not _answers(one)}
            if missing and time.monotonic() > deadline:
                names = ", ".join(f"{i} ({address})" for i, address in missing.items())
                raise TimeoutError(
                    f"Worker {task} ({workers[task]}) has waited {timeout:.0f} seconds for the "
                    f"workers {names}, which do not answer. Start the same script on each of "
                    "them, with its own task index in TF_CONFIG, and see that their ports can be "
                    "reached from here. If they take longer to start, raise timeout=."
                )
            if missing and time.monotonic() > notice:
                notice = time.monotonic() + NEXT_NOTICE
                _log.warning(
                    "Worker %d (%s) is waiting for %s, for up to %.0f seconds.",
                    task,
                    workers[task],
                    ", ".join(f"worker {i} ({address})" for i, address in missing.items()),
                    deadline - time.monotonic(),
                )
            if missing:
                time.sleep(0.1)


def _listen(address: str) -> socket.socket:
    """A socket that others can connect to, until TensorFlow takes over the port.

    It listens at the address only, as far as that is one of this machine, and not of a gateway.
    """
    host, _, port = address.rpartition(":")
    try:
        for family, *_, place in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            try:
                return socket.create_server(place[:2], family=family, backlog=128)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", int(port)), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True
            )
        return socket.create_server(("", int(port)), backlog=128)
    except OSError as error:
        raise RuntimeError(
            f"This process cannot listen at its address {address}: {error}. Another program, "
            "perhaps of an earlier run, has the port; end it, or choose another port."
        ) from error


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True

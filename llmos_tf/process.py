"""Memory of this process as the operating system counts it."""

import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """Returns the most memory that this process had resident at a time, in bytes.

    On Linux it is what this program had. `getrusage` alone would say what the process had that
    started it, if that was more.

    Returns:
        Bytes since the process began.

    Example:
        >>> before = llmos_tf.memory.peak_resident_bytes()
        >>> model.fit(dataset)
        >>> grown = llmos_tf.memory.peak_resident_bytes() - before
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text(encoding="ascii").splitlines())
        peaks = [1024 * int(words[1]) for words in lines if words and words[0] == "VmHWM:"]
        if peaks:
            return peaks[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, all others kilobytes.
    return peak if sys.platform == "darwin" else 1024 * peak

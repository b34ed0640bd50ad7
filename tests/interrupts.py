"""Ctrl-C in the middle of compiled work."""

from __future__ import annotations

import subprocess
import sys
import textwrap

_SCRIPT = """
import numpy as np, os, signal, threading, time
from lowbit import _C
{setup}
def interrupt():
    time.sleep(1.0)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
threading.Thread(target=interrupt, daemon=True).start()
try:
    {call}
except KeyboardInterrupt:
    assert time.monotonic() - sent < 2, time.monotonic() - sent
    print("stopped")
"""


def assert_stops(call: str, setup: str) -> None:
    """Some half a minute of work, sent a SIGINT after a second: KeyboardInterrupt within two more, on every thread.

    Args:
        call: an expression with _C, which ends too late.
        setup: statements before it, with np.
    """
    script = _SCRIPT.format(setup=textwrap.dedent(setup), call=call)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "stopped\n", done.stderr[-2000:]

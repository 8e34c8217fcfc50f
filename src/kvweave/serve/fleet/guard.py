"""A command whose processes all end when it does, or when whoever started it has gone: `python guard.py COMMAND...`.

It is started as the leader of a process group, with a pipe as its standard input that nobody writes to. A server may
leave workers behind when it is killed, and whoever supervises it may be killed as well; neither leaves anything here.
It needs the standard library alone.
"""

import os
import signal
import subprocess
import sys
import threading

_SECONDS = 40.0  # from asking processes to end until they are ended


def main(command: list[str]) -> None:
    """Run the command until it ends or the pipe is closed; then nothing of the group is left."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # what the group is asked to do, this one does last
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_the_pipe, args=(child,), daemon=True).start()
    child.wait()
    os.killpg(0, signal.SIGKILL)


def _end_with_the_pipe(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    try:
        child.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])

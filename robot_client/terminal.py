"""The terminal a person sits at: keys one by one as they are pressed, read in one place by whoever's turn it is."""

from __future__ import annotations

import atexit
import os
import re
import select
import signal
import sys
import termios
import tty
from contextlib import suppress

from robot_client.errors import PilotError

SEQUENCE = re.compile(r"\x1b(\[\[?[0-9;]*[A-Za-z~]|O[A-Za-z])")
"""What an arrow or F5 sends.  F5's holds a 1 and a 5, which nobody has pressed."""
BEGUN = re.compile(r"\x1b(\[\[?[0-9;]*|O)?$")
"""A sequence whose end has not arrived."""


class Terminal:
    """The terminal at a file descriptor, without echo and key by key (cbreak) until close(); Ctrl-C stays what it is.

    It is put back at close(), when the process ends, and when SIGTERM or SIGHUP ends it; after SIGKILL, `stty sane`
    puts it back.  A process that was suspended and goes on reads key by key again.

    Made by the main thread, on account of the signals.  Raises PilotError where there is no terminal.
    """

    def __init__(self, fd: int = 0):
        if not os.isatty(fd):
            raise PilotError("keys are read from a terminal, and standard input is none: start this from a terminal")
        self.closed = False
        self._fd = fd
        self._begun = ""
        self._before = termios.tcgetattr(fd)
        self._handlers = {signal.SIGHUP: self._end, signal.SIGTERM: self._end, signal.SIGCONT: self._go_on}
        tty.setcbreak(fd)
        atexit.register(self.close)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, handler)

    def keys(self, timeout_s: float | None = 0.0) -> str:
        """The keys pressed since the last call, a letter each, in order; Enter is "\\n".

        Waits up to timeout_s for one, for ever with None.  Raises PilotError when the terminal is gone.
        """
        if self.closed:
            raise PilotError("the terminal has been closed")
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return ""
        try:
            read = os.read(self._fd, 4096)
        except OSError:
            read = b""
        if not read:
            raise PilotError("the terminal is gone")
        text = SEQUENCE.sub("", self._begun + read.decode(errors="replace"))
        begun = BEGUN.search(text)
        self._begun = begun.group() if begun else ""
        return text.removesuffix(self._begun).replace("\r", "\n")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Again does nothing."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, signal.SIG_DFL)
        with suppress(termios.error):  # it may be gone
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)

    def _end(self, number: int, _) -> None:
        self.close()
        signal.raise_signal(number)

    def _go_on(self, *_) -> None:
        tty.setcbreak(self._fd)


_own: Terminal | None = None


def own_terminal() -> Terminal:
    """The one that this process was started in: the same for all who ask, until it is closed."""
    global _own
    if _own is None or _own.closed:
        _own = Terminal()
    return _own

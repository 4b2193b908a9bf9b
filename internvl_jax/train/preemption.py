"""SIGTERM and Ctrl-C: the first asks the run to save and end, the second ends it at once."""

import os
import signal
import threading

# 128 + signal number, as shells report it.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Watch:
    """Context manager that turns signals into a flag which the train loop reads between steps.

    The second signal ends the process without any clean-up. That is safe at any moment: a
    checkpoint counts only once its directory has been renamed.

    Signals are read by a thread, from the descriptor that the C-level handler writes to, so the
    second one works even while the main thread sits in a long compilation. Outside the main thread
    (some notebooks) no handler can be installed, and the flag never rises.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Watch":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while data := os.read(self._reader, 1):
            number = data[0]
            if number not in EXIT_CODES:
                continue
            if self.signal is not None:
                os.write(2, b"\nsecond signal: ending at once; saved checkpoints are intact\n")
                os._exit(EXIT_CODES[number])
            self.signal = signal.Signals(number)
            os.write(
                2,
                f"\n{self.signal.name}: finishing this step and saving; "
                "once more to end at once\n".encode(),
            )

    def __exit__(self, *_: object) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._writer)  # ends the thread's read
        self._thread.join()
        os.close(self._reader)
        self._previous = {}

    @property
    def number(self) -> int:
        """Of the first signal received; 0 before there is one."""
        return 0 if self.signal is None else int(self.signal)

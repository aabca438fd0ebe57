"""`bindery chat` as a person meets it: keys go into a terminal, and what they do is read from its screen."""

import errno
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time

import pytest
from conftest import BINARY

MODEL = os.environ["BINDERY_TEST_MODEL"]
# Begin and end of a line's editing: the editor asks for pasted text to be marked, and no more.
PROMPT, ENTERED = "\x1b[?2004h", "\x1b[?2004l\r\n"
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
LONG = "Write a long story about a lighthouse keeper and her seven cats."


class Terminal:
    """A pseudo-terminal of its own, and `bindery chat` in it as the process that ctrl-c reaches."""

    def __init__(self, home, *flags, stdout=None):
        self.master, self.slave = pty.openpty()
        self.flags_before = termios.tcgetattr(self.slave)
        self.screen = ""
        self._num_read = 0
        environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "BINDERY_CACHE": str(home)}
        self.process = subprocess.Popen(
            [BINARY, "chat", MODEL, "--temperature", "0", "--max-tokens", "160", *flags],
            stdin=self.slave, stdout=self.slave if stdout is None else stdout, stderr=self.slave, env=environment,
            cwd=home, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def press(self, keys):
        os.write(self.master, keys.encode())

    def say(self, line):
        """Returns when the line was taken, and its terminal with it: then ctrl-c is a signal and no key."""
        self.press(line + ENTER)
        self.wait_for(ENTERED)

    def wait_for(self, text, timeout=120):
        """What came since the last call, up to this text."""
        deadline = time.monotonic() + timeout
        while (at := self.screen.find(text, self._num_read)) < 0:
            self._read(deadline, text)
        came, self._num_read = self.screen[self._num_read:at], at + len(text)
        return came

    def wait_for_more(self, timeout=120):
        """Until anything comes that was not there before."""
        deadline = time.monotonic() + timeout
        while len(self.screen) <= self._num_read:
            self._read(deadline, "anything")

    def _read(self, deadline, wanted):
        assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], (wanted, self.screen)
        try:
            self.screen += os.read(self.master, 1 << 16).decode(errors="replace")
        except OSError as error:
            assert error.errno == errno.EIO
            raise AssertionError(f"it ended before {wanted!r}: {self.screen!r}") from None

    def end(self, timeout=60):
        """Its exit code and the rest of its screen."""
        code = self.process.wait(timeout)
        while select.select([self.master], [], [], 0)[0]:
            self.screen += os.read(self.master, 1 << 16).decode(errors="replace")
        assert termios.tcgetattr(self.slave) == self.flags_before
        assert "panicked" not in self.screen
        return code, self.screen[self._num_read:]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def chat(tmp_path):
    """Starts chats; ends what is left of them."""
    started = []

    def run(*flags, **options):
        terminal = Terminal(tmp_path, *flags, **options)
        started.append(terminal)
        terminal.wait_for(PROMPT)
        return terminal

    yield run
    for terminal in started:
        terminal.close()


def test_ctrl_c_stops_an_answer_and_sigterm_the_program(chat, tmp_path):
    terminal = chat()
    terminal.say(LONG)
    terminal.wait_for_more()
    terminal.press(CTRL_C)
    terminal.wait_for("[stopped]")
    assert "tokens, first after" in terminal.wait_for(PROMPT)

    terminal.say("What is the capital of France?")
    answer = terminal.wait_for(PROMPT)
    assert "tokens, first after" in answer and "[stopped]" not in answer
    assert len(answer.split("\r\n")[0]) > 1, answer

    terminal.press("half a line")
    terminal.wait_for("half a line")
    terminal.process.send_signal(signal.SIGTERM)
    code, rest = terminal.end()
    # The code of a chat that is ended by a signal between two piped lines.
    assert code == 1
    assert "\x1b[?2004l" in rest and rest.endswith("\r\nerror: interrupted\r\n"), rest
    history = (tmp_path / "chat-history").read_text()
    assert LONG in history and "capital of France" in history and "half" not in history


def test_ctrl_c_at_the_prompt_is_a_hint_and_ctrl_d_leaves(chat):
    terminal = chat()
    terminal.press(CTRL_C)
    terminal.wait_for("ctrl-d leaves")
    terminal.wait_for(PROMPT)
    terminal.press(CTRL_D)
    assert terminal.end()[0] == 0


def test_a_ctrl_c_between_answers_does_not_stop_the_next(chat, tmp_path):
    terminal = chat()
    # Until somebody reads it, the command that writes to it takes no keys: what is pressed is a signal.
    os.mkfifo(tmp_path / "pipe")
    terminal.say("/save pipe")
    terminal.press(CTRL_C)
    terminal.wait_for("^C")
    assert (tmp_path / "pipe").read_text() == "[]\n"
    terminal.wait_for(PROMPT)
    terminal.say("What is the capital of France?")
    answer = terminal.wait_for(PROMPT)
    assert "tokens, first after" in answer and "[stopped]" not in answer
    terminal.press(CTRL_D)
    assert terminal.end()[0] == 0


def test_sigterm_gives_the_keys_back_where_answers_go_to_a_file(chat, tmp_path):
    """The editor has no signal handler of its own there, and the terminal is in its mode all the same."""
    with open(tmp_path / "answers", "wb") as answers:
        terminal = Terminal(tmp_path, stdout=answers)
    try:
        deadline = time.monotonic() + 120
        while termios.tcgetattr(terminal.slave) == terminal.flags_before:
            assert time.monotonic() < deadline and terminal.process.poll() is None, terminal.screen
            time.sleep(0.02)
        terminal.process.send_signal(signal.SIGTERM)
        code, rest = terminal.end()
        assert code == 1
        assert rest.endswith("error: interrupted\r\n"), rest
    finally:
        terminal.close()

"""Ctrl-C ends every command with exit code 130 and without a traceback, also while the program is being imported."""

import signal
import sys
from pathlib import Path

import click
import pytest
from command_line import run_python

from tinystories import __main__, cli
from tinystories.cli.common import run

# Sends SIGINT to its own process when the module in argv[1] is about to be imported, then runs the command.
# The handler is set first, because a background job of a shell inherits SIGINT as ignored.
PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
MODULE = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)
    sent = False
sys.meta_path.insert(0, Finder())
from tinystories.__main__ import main
main()
"""
COMMANDS = ["info", "generate", "prepare", "train", "sweep", "eval", "quantize", "export", "import", "push", "fetch"]


@pytest.mark.parametrize("module", ["tinystories.cli", "click", "tinystories.config", "tinystories.cli.common"])
def test_during_the_imports_of_the_command_line(module: str) -> None:
    """The reported case; all commands share these imports."""
    done = run_python("-c", PROGRAM, module, "info")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("module", ["numpy", "tinystories.checkpoint", "tokenizers"])
def test_during_the_imports_of_a_command(module: str) -> None:
    done = run_python("-c", PROGRAM, module, "generate", "--max-tokens", "2")
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert done.stderr.strip() == "stopped"


def test_while_the_first_module_is_imported() -> None:
    program = PROGRAM.replace(
        "import os, signal, sys", "import os, sys, _signal as signal"
    )  # signal is not imported yet
    done = run_python("-S", "-c", f"import sys; sys.path[:0] = {sys.path}\n{program}", "signal", "info")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_while_a_library_creates_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch's import has such classes, and Python makes a RuntimeError of what `__set_name__` raises."""

    class Descriptor:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    @click.command()
    def command() -> None:
        type("Owner", (), {"attribute": Descriptor()})

    assert run(command, []) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_package_itself_imports_nothing() -> None:
    """Before it is imported, nothing can handle Ctrl-C: that must be a moment."""
    program = "import sys; before = set(sys.modules); import tinystories; print(*(set(sys.modules) - before))"
    assert run_python("-c", program).stdout.split() == ["tinystories"]


def test_the_installed_command_is_the_one_that_handles_it() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'tinystories = "tinystories.__main__:main"' in pyproject
    assert __main__.main.__module__ == "tinystories.__main__"


def test_an_ignored_signal_stays_ignored() -> None:
    """As in `nohup` and in background jobs of scripts."""
    program = PROGRAM.replace("signal.default_int_handler", "signal.SIG_IGN")
    done = run_python("-c", program, "click", "--version")
    assert done.returncode == 0, done.stderr
    assert "stopped" not in done.stderr


@pytest.mark.extended
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command: str) -> None:
    """Whatever the words after it: they are not read before the command is imported."""
    done = run_python("-c", PROGRAM, f"tinystories.cli.{cli.COMMANDS[command][0]}", command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")

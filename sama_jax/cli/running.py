"""Runs one command: parses, catches signals, turns errors into one line and an exit code."""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sama_jax import terminal
from sama_jax.cli.config_file import with_config
from sama_jax.devices import compile_cache, processes
from sama_jax.devices.child_process import failed_allocation
from sama_jax.errors import (
    EXIT_CODES,
    Interrupted,
    OutOfMemory,
    OutputError,
    SamaError,
    UsageError,
)

EPILOG = "\n".join(
    [
        "exit codes:",
        *(f"  {code:<3} {meaning}" for code, meaning in EXIT_CODES.items()),
        "",
        f"{terminal.TRACEBACK}=1 shows the traceback of an error, too.",
    ]
)


class Parser(argparse.ArgumentParser):
    """Ends a wrong command line with one line; every `--help` ends with the exit codes."""

    def __init__(self, **options: Any):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(epilog=EPILOG, formatter_class=raw, **options)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)
        self.register("type", int, _whole)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses; a command that can save its flags takes those of `--config`, too."""
        if args is not None and "--save-config" in self._option_string_actions:
            try:
                args = with_config(self, args)
            except SamaError as error:
                _say(f"{self.prog}: {error}")
                sys.exit(error.exit_code)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with 2, like every other usage error."""
        _say(f"{self.prog}: {message}; see {self.prog} --help")
        sys.exit(UsageError.exit_code)

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            super()._print_message(message, file)
            (file or sys.stderr).flush()
        except OutputError as error:
            _say(f"{self.prog}: {error}")
            sys.exit(error.exit_code)


def _whole(text: str) -> int:
    """Reads a whole number; 1_2, which Python reads as 12, is none."""
    if re.fullmatch(r"[-+]?[0-9]{1,4000}", text, re.ASCII):
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")


class _StoreOnce(argparse.Action):
    """Keeps the value of a flag; given a second time, it does not silently replace the first."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        given = namespace.__dict__.setdefault("given", set())
        if flag is not None and self.dest in given:
            parser.error(f"argument {flag}: is given twice, but takes one value")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def command_of(
    commands: Any,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    continues: bool = True,
) -> Parser:
    """Adds a command; interrupted and given again, it `continues` or starts over."""
    parser: Parser = commands.add_parser(name, help=summary, description=summary)
    kept = "what is finished is kept: {} continues"
    parser.set_defaults(run=run, again=kept if continues else "{} starts over")
    return parser


def run_program(program: str, parser: Parser, argv: Sequence[str] | None) -> int:
    """Parses and runs the command's `run`; returns the exit code. Errors are one line on stderr.

    Without `argv` it owns the process: signals are caught, and after one nothing runs any more;
    whatever is printed is escaped.
    """
    if argv is None:
        terminal.guard_streams()
    name, given = program.split()[-1], sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given)
    args.argv, args.command = given, f"{program} {shlex.join(given)}"
    interrupted = f"interrupted; {args.again.format(args.command)}"
    if argv is None:
        _end_on_signals(f"{name}: {interrupted}")
    try:
        with _shortage(args):
            _keep_programs(args, owns=argv is None)
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        known = isinstance(error, SamaError | KeyboardInterrupt)
        if not known and processes.is_child():
            raise  # perhaps a peer has gone: the supervisor decides what is said
        line = (str(error) or interrupted) if known else terminal.fault_line(error)
        _say(f"{name}: {line}")
        if terminal.wants_traceback():
            _print_causes(error)
        stopped = isinstance(error, KeyboardInterrupt | Interrupted)
        code = Interrupted.exit_code if stopped else getattr(error, "exit_code", 1)
        if stopped and argv is None:
            os._exit(code)
        return code


def _keep_programs(args: argparse.Namespace, *, owns: bool) -> None:
    """Turns JAX's compile cache on or off, before anything imports JAX.

    By default it is on in a process that is ours, unless the command measures compiling.
    """
    given = vars(args)
    if given.get("no_compile_cache"):
        if given["compile_cache"] is not None:
            raise UsageError("--compile-cache and --no-compile-cache exclude each other")
        compile_cache.leave_compile_cache()
        return
    if owns or given.get("compile_cache"):
        compile_cache.use_compile_cache(given.get("compile_cache"))
    by_default = owns and not given.get("measures_compiling")
    if by_default and (told := compile_cache.use_default_cache()):
        _say(f"note: {told}")


def _say(line: str) -> None:
    """Prints an error; there may be nobody left to read it."""
    with contextlib.suppress(OSError, OutputError):
        print(terminal.one_line(line), file=sys.stderr, flush=True)


def _print_causes(error: BaseException) -> None:
    """Prints the traceback of an error and of what is behind it, also after `from None`."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = False
        link = link.__cause__ or link.__context__
    traceback.print_exception(error)


def _end_on_signals(line: str) -> None:
    """Ends the process with one line at Ctrl-C and SIGTERM, at once.

    What is finished is in its files at any moment, so nothing is left to put in order, while an
    exception would come up wherever it strikes: in an import, a destructor, a callback of XLA.
    Training has handlers of its own, which save a last checkpoint.
    """
    said: list[bool] = []
    # A stream of its own: while a tokenizer works, standard error is held back.
    stderr = os.dup(2)

    def end(*_: object) -> None:
        if said:  # a second signal while the line of the first is written
            return
        said.append(True)
        cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a progress bar hides it
        os.write(stderr, f"{cursor}{terminal.one_line(line)}\n".encode(errors="replace"))
        os._exit(Interrupted.exit_code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


# --- memory ---------------------------------------------------------------------------------------


@contextmanager
def _shortage(args: argparse.Namespace) -> Iterator[None]:
    """Raises `OutOfMemory` in place of the error of an allocation that failed."""
    try:
        yield
    except SamaError:
        raise
    except Exception as error:
        reason = failed_allocation(error)
        if reason is None:
            raise
        raise OutOfMemory(f"out of memory ({reason}); {_smaller(args)}") from error


def _smaller(args: argparse.Namespace) -> str:
    """Says what needs less memory, by the flags that the command has."""
    advice = {
        "batch_size": "a smaller --batch-size",
        "max_length": "a smaller --max-length",
        "models": "--models in-turn",
        "mesh": "--mesh data=1,model=N over N devices",
        "dtype": "--dtype bfloat16",
    }
    found = [text for flag, text in advice.items() if hasattr(args, flag)]
    return f"what needs less: {', '.join(found)}" if found else "it needs a machine with more"

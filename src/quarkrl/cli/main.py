"""The command `quarkrl`: choose the subcommand, run it, and turn errors into exit codes.

0: finished. 2: a user error, reported in one line, `error: …`. 130 and 143: stopped by Ctrl-C and SIGTERM. Results
go to standard output, messages and progress to standard error.
"""

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

from quarkrl import __version__
from quarkrl.cli import (
    chat,
    demo,
    evaluate,
    export,
    generate,
    guesses,
    play,
    presets,
    push,
    report,
    samples,
    score,
    train,
    watch,
    words,
)
from quarkrl.cli.common import note
from quarkrl.cli.parser import Parser
from quarkrl.cli.streams import accept_any_character
from quarkrl.errors import UserError, did_you_mean
from quarkrl.runs.interrupts import Stopped

_COMMANDS = (demo, presets, train, generate, chat, play, evaluate, samples, watch, report, score, words, export, push)
COMMANDS = {command.NAME: command for command in _COMMANDS}


_EXIT_SECONDS = 5.0  # How long an unsuccessful command may wait for threads and child processes of rewards.


def command() -> NoReturn:
    """Run the command of this process, and end it with the exit code."""
    code = main()
    if code:
        threading.Thread(target=_end_process, args=(code,), daemon=True).start()
    sys.exit(code)


def _end_process(code: int) -> None:
    """End a process whose exit takes too long: Python waits for every thread and child that a reward has started."""
    time.sleep(_EXIT_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    _set_environment()
    accept_any_character()
    try:
        _run(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        # The reader of our output has ended. The interpreter must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:  # OSError: a directory that is not writable, a full disk
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        from quarkrl.runs.collectives import wait_for_all_processes

        note(str(stopped))
        wait_for_all_processes()
        return stopped.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parser_of(name: str) -> Parser:
    """Return the parser of a subcommand that has no `parse` of its own."""
    command = COMMANDS[name]
    parser = Parser(prog=f"quarkrl {name}", description=f"{command.HELP[0].upper()}{command.HELP[1:]}.")
    command.add_options(parser)
    parser.set_defaults(command=name)
    return parser


def _run(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        _overview().parse(argv or ["--help"])
        raise UserError(f"COMMAND is missing: must be one of {', '.join(COMMANDS)}. See quarkrl --help.")
    name, *rest = argv
    if name not in COMMANDS:
        usual = guesses.COMMANDS.get(name)
        hint = f" Did you mean {usual!r}?" if usual in COMMANDS else did_you_mean(name, COMMANDS)
        raise UserError(f"COMMAND {name!r}: must be one of {', '.join(COMMANDS)}.{hint}")
    command = COMMANDS[name]
    command.run(command.parse(rest) if hasattr(command, "parse") else parser_of(name).parse(rest))


def _overview() -> Parser:
    """Return the parser of `quarkrl --help` and `quarkrl --version`."""
    names = "\n".join(f"  {name:<10} {command.HELP}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="quarkrl",
        usage="quarkrl COMMAND …",
        description="Teach a language model what not to do, with Quark.",
        epilog=f"commands:\n{names}\n\nquarkrl COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"quarkrl {__version__}")
    return parser


def _set_environment() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # While other programs run, a thread that waits actively takes the core of the thread that it waits for. The default
    # is 300,000 rounds. Measured in docs/performance.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Warnings of libraries about settings that no option of ours changes.
    warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|is_gradient_checkpointing|find_unused).*")

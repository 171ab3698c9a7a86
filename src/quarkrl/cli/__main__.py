"""The command `quarkrl`, and `python -m quarkrl.cli`."""

import sys
from typing import NoReturn


def command() -> NoReturn:
    """Run the command of this process. Ctrl-C while its modules are imported ends it, as later, without a traceback."""
    try:
        from quarkrl.cli.main import command as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    command()

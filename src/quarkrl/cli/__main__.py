"""`python -m quarkrl.cli` is the command `quarkrl`."""

import sys

from quarkrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

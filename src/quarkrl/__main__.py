"""`python -m quarkrl` is the command `quarkrl`."""

import sys

from quarkrl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

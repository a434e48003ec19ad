"""`python -m moe` is `moesmith`."""

import sys

from moe.cli import main

if __name__ == "__main__":
    sys.exit(main())

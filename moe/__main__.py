"""Entry point of `python -m moe`, the same program as `moesmith`."""

import sys

from moe.cli import main

if __name__ == "__main__":
    sys.exit(main())

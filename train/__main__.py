"""Entry point of `python -m train`."""

import sys

from train.cli import main
from train.errors import quiet_late_writers

if __name__ == "__main__":
    quiet_late_writers()
    sys.exit(main())

"""`accelerate launch -m contralto.align ...`: what `contralto align` does, in every process."""

import sys

from contralto.cli.align import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m contralto`: the same as the command `contralto`."""

import sys

from contralto.cli import main

sys.exit(main())

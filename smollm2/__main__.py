"""`python -m smollm2` is the command `smollm2`."""

import sys

from smollm2.cli.main import main

sys.exit(main())

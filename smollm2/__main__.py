"""Run the command `smollm2` as `python -m smollm2`."""

import sys

from smollm2.cli.main import main

sys.exit(main())

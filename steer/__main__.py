"""`python -m steer`."""

import sys

from steer.cli import main

sys.exit(main())

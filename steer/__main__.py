"""`python -m steer`."""

from __future__ import annotations

import sys

from steer.cli import main

sys.exit(main())

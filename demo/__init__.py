"""The demo: a page in which steering is seen as it happens, and what it costs.

`app` makes the page, `tabs` hold one file a tab, `parts` the pieces that are drawn in the browser, `actions` all that
calls steer, `recipes` what a tab was asked, as commands and as an address; `session` is what belongs to one visitor.
"""

from __future__ import annotations

import os

# Read when gradio is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

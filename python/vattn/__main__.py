"""``python -m vattn``: the same commands as the console script ``vattn``."""

from __future__ import annotations

import sys

from vattn.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())

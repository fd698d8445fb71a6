"""``python -m vattn.bench.gpu.smoke``: see `run`."""

import sys

from vattn.bench.gpu.smoke.run import main

if __name__ == "__main__":
    sys.exit(main())

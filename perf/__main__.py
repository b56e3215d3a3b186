"""`python -m perf` is `vfio-ferry bench`."""

import sys

from ferry.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))

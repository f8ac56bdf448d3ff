"""``python -m torch_ext``: the command line."""

import sys

from torch_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

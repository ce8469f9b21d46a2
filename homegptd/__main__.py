"""`python -m homegptd` and the console script `homegptd`."""

import sys

from homegptd.app.cli import main

if __name__ == "__main__":
    sys.exit(main())

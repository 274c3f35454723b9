"""python -m tl_adapters.cli"""

import sys

from tl_adapters.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

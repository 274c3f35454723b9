"""python -m tl_adapters, which accelerate launch takes as -m tl_adapters."""

import sys

from tl_adapters.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

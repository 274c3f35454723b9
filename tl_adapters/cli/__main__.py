"""python -m tl_adapters.cli"""

import sys

from tl_adapters.cli import main

sys.exit(main())

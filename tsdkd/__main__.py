"""`python -m tsdkd`, as the command `tsdkd`."""

import sys

from tsdkd.cli import main

sys.exit(main())

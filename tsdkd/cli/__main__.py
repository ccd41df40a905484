"""`python -m tsdkd.cli`, also for `accelerate launch -m tsdkd.cli train …`."""

import sys

from tsdkd.cli import main

sys.exit(main())

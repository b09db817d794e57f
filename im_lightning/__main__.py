"""`python -m im_lightning` is the command `im-lightning`."""

import sys

from im_lightning.cli import main

sys.exit(main())

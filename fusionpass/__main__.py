"""`python -m fusionpass` is the command `fusionpass`."""

import sys

from .cli import main

sys.exit(main())

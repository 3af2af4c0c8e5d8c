"""`python -m fastgrpo`, as `torchrun -m fastgrpo train …` starts it on every rank."""

import sys

from fastgrpo.commands.main import main

sys.exit(main())

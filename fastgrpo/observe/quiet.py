"""Other libraries' chatter, which would bury the one line that matters, kept low."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Keeps diffusers, transformers and bitsandbytes to their errors, without loading bars; imports none of them.

    Called again once they are imported, since their loading bars read nothing of the environment. A verbosity that the
    user has set in the environment stays.
    """
    for package in ("diffusers", "transformers"):
        verbosity = os.environ.setdefault(f"{package.upper()}_VERBOSITY", "error")
        if sys.modules.get(package) is not None and verbosity == "error":
            messages = importlib.import_module(f"{package}.utils.logging")
            messages.set_verbosity_error()
            messages.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What distributed checkpointing says on one rank, each time.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

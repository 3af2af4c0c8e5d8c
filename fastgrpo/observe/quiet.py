"""Other libraries' chatter, which would bury the one line that matters, kept low."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Keeps diffusers, transformers and bitsandbytes to their errors, without loading bars; imports none of them.

    What has been imported already is told; what comes later reads the environment. A verbosity that the user has set
    in the environment stays.
    """
    for package in ("diffusers", "transformers"):
        variable = f"{package.upper()}_VERBOSITY"
        chosen = variable in os.environ
        os.environ.setdefault(variable, "error")
        if sys.modules.get(package) is not None and not chosen:
            messages = importlib.import_module(f"{package}.utils.logging")
            messages.set_verbosity_error()
            messages.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # What checkpointing on one rank is told, at each of them.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

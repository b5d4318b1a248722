"""The command line of a module that is no run: what cannot be read is an error of the user's, in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from passes.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError`."""

    def error(self, message: str) -> NoReturn:  # argparse's way prints its usage over the message
        raise UserError(f"{message}; --help shows what is taken")

"""What the command does first: handle Ctrl-C and SIGTERM, before libraries are imported, which takes seconds."""

from __future__ import annotations

import sys

from pipeline.host import interrupts


def main() -> None:
    interrupts.install()
    try:
        from pipeline.__main__ import main as command

        interrupts.check()
        code = command()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    sys.exit(interrupts.exit_code(code))

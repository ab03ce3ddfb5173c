"""Start `gdn-ops`; its commands are loaded only when it runs."""

from __future__ import annotations

import sys

NEEDS_EXTRA = "gdn-ops needs the cli extra: pip install 'gdn_ops[cli]'"


def main() -> None:
    """Run the command line, or exit with code 2 where typer or rich is not installed."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print(NEEDS_EXTRA, file=sys.stderr)
        raise SystemExit(2) from None
    from gdn_ops.cli.commands import app

    app(prog_name="gdn-ops")

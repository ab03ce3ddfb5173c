"""Run `gdn-ops` as `python -m gdn_ops`."""

from gdn_ops.cli import main

if __name__ == "__main__":
    main()

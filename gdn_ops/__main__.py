"""`python -m gdn_ops` is `gdn-ops`."""

from gdn_ops.cli import main

if __name__ == "__main__":
    main()

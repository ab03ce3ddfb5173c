"""Run `gdn-ops bench gpu` with nothing but torch installed: `python -m gdn_ops.bench.gpu`."""

from gdn_ops.bench.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())

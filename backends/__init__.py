"""Hold one module per backend; each defines `BACKEND`, a subclass of `gdn_ops.Backend`."""

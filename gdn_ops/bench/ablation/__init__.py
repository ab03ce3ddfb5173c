"""Train small Gated DeltaNets with one part taken out at a time, and compare them."""

"""List the exit codes of `gdn-ops`, each with its meaning."""

from __future__ import annotations

from gdn_ops._interrupt import CODE

DONE, WRONG, NOT_POSSIBLE, UNFORESEEN, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, CODE, 141

MEANINGS = {
    DONE: "done, and everything that was judged passed",
    WRONG: "numbers are wrong, or a check, a kernel or a model failed",
    NOT_POSSIBLE: "an argument is wrong, or something is missing here: the line says what",
    UNFORESEEN: "a fault of gdn_ops",
    INTERRUPTED: "Ctrl-C",
    CLOSED_PIPE: "the reader of the output has gone, as `head` goes",
}

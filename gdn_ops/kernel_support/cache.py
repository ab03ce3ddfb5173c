"""Say where the user's cache is: certificates, and kernels that were compiled here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return the user's cache: GDN_OPS_CACHE, gdn_ops in the XDG cache, or in the temporary one."""
    own = os.environ.get("GDN_OPS_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        return Path(xdg) / "gdn_ops"
    try:
        return Path.home() / ".cache" / "gdn_ops"
    except RuntimeError:
        # A user without a home, as in a container.
        return Path(tempfile.gettempdir()) / f"gdn_ops-{os.getuid()}"

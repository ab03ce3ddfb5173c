"""Build libgdn_ops_ort.so, the custom-op library for onnxruntime.

    python native/build.py [ONNXRUNTIME INCLUDE DIRECTORY]

ORT_INCLUDE, CXX, CXXFLAGS and LDFLAGS of the environment are honoured. Nothing of onnxruntime is
linked: the library receives its functions from the process that loads it. The kernels, their levels
and how they are compiled are those of backends/cpp; only the standard library of Python is needed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "backends" / "cpp" / "build.py"
HEADER = "onnxruntime_c_api.h"
BELOW = ("", "include", "onnxruntime", "include/onnxruntime", "include/onnxruntime/core/session")
"""Where distributions and release archives keep the header."""

NONE = """there are no onnxruntime headers in /usr/include or /usr/local/include. Either
  apt install libonnxruntime-dev         (Debian 13 and newer)
or unpack a release archive of onnxruntime (onnxruntime-linux-x64-*.tgz) and name its folder:
  make native ORT_INCLUDE=onnxruntime-linux-x64-VERSION/include"""


def load_build() -> ModuleType:
    """Load build.py of the kernels by its path: importing gdn_ops needs torch."""
    spec = importlib.util.spec_from_file_location("gdn_ops_cpp_build", KERNELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_include(given: str) -> Path:
    """Return the folder of the headers, in the one that is given or where systems keep them.

    Raises:
        SystemExit: there are none.
    """
    for root in [given] if given else ["/usr", "/usr/local"]:
        for below in BELOW:
            if (Path(root, below) / HEADER).is_file():
                return Path(root, below)
    if given:
        raise SystemExit(
            f"native/build.py: {given} has no {HEADER}, should be the include directory of "
            f"onnxruntime 1.18 or newer"
        )
    raise SystemExit(f"native/build.py: {NONE}")


def main(arguments: Sequence[str]) -> None:
    """Build the library into native/build, and say what it was built with.

    Raises:
        SystemExit: it cannot be built.
    """
    include = find_include(arguments[0] if arguments else os.environ.get("ORT_INCLUDE", ""))
    kernels = load_build()
    source = str(HERE / "operators.cc")
    door = kernels.Door("libgdn_ops_ort.so", source, ("-isystem", str(include)))
    try:
        built = kernels.build(HERE / "build", door=door)
    except kernels.BuildError as error:
        lines = "".join(f"\n  {line}" for line in getattr(error, "lines", ()))
        raise SystemExit(f"native/build.py: {error}{lines}") from error
    for level, reason in built.left_out.items():
        print(f"the level {level} is left out: {reason}")
    print(f"built native/build/{built.path.name} with the headers in {include}")


if __name__ == "__main__":
    main(sys.argv[1:])

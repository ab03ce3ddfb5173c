"""Build the C++ kernels with the package where there is a compiler, and install without where not.

Everything else stands in pyproject.toml. GDN_OPS_BUILD_CPP=0 leaves the kernels out, and with
GDN_OPS_BUILD_CPP=1 an installation without them is an error.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("backends", "cpp")
IN_PACKAGE = Path("gdn_ops", "backends", "cpp")


def load_build() -> ModuleType:
    """Load build.py by its path: importing gdn_ops needs torch, which may not be there yet."""
    spec = importlib.util.spec_from_file_location("gdn_ops_cpp_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildKernels(build_ext):
    """Build the library: into the wheel, or beside its sources in an editable installation."""

    def run(self) -> None:
        wanted = os.environ.get("GDN_OPS_BUILD_CPP", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"GDN_OPS_BUILD_CPP is {wanted!r}, should be 0, 1 or not be set")
        target = self.target()
        # One that an earlier build left would not be of these sources.
        target.unlink(missing_ok=True)
        if wanted == "0":
            return
        try:
            built = build.build(target.parent)
        except build.BuildError as error:
            lines = "".join(f"\n  {line}" for line in getattr(error, "lines", ()))
            if wanted == "1":
                raise SystemExit(f"GDN_OPS_BUILD_CPP=1: {error}{lines}") from error
            self.warn(f"gdn_ops is installed without its C++ kernels: {error}{lines}")
            return
        for level, reason in built.left_out.items():
            self.warn(f"the level {level} is left out: {reason}")
        self.announce(f"built {built.path}: {', '.join(built.levels)}", level=2)

    def target(self) -> Path:
        """Return the path of the library."""
        in_place = self.inplace or self.editable_mode
        return (FOLDER if in_place else Path(self.build_lib, IN_PACKAGE)) / build.NAME

    def get_outputs(self) -> list[str]:
        return [str(self.target())] if self.target().exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(FOLDER.glob("src/*")) if path.suffix in (".cc", ".h")]


class PlatformWheel(bdist_wheel):
    """Tag a wheel with its platform if it carries the library, but with no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        has_library = self.get_finalized_command("build_ext").target().exists()
        return "py3", "none", platform if has_library else "any"


class WithKernels(setuptools.Distribution):
    """Describe a distribution that has something to compile, though no extension of Python."""

    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setuptools.setup(
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel}, distclass=WithKernels
    )

"""What pyproject.toml cannot say: where there is a C++ compiler, the CPU kernels are compiled into the wheel.

They are compiled for every instruction set of this architecture and chosen at run time, so that the wheel serves any
CPU of it. Without a compiler the wheel holds their sources, which the first call compiles; so does an editable
installation.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "codegen")]  # fxquant/codegen is a link, which an archive may lack

import cpu_build  # noqa: E402  type: ignore[import-not-found]

from fxquant.errors import FxquantError  # noqa: E402

PLACE = Path("fxquant", "codegen", "native")


class BuildPy(build_py):
    """The package, and the compiled kernels beside their sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            compiler = cpu_build.compiler()
            for old in self.place.glob("*.so"):  # of a build folder that is used again
                old.unlink()
            for isa in cpu_build.of_architecture():
                self.announce(f"compiling the CPU kernels for {isa.name}", level=2)
                (self.place / cpu_build.file_name(isa)).write_bytes(cpu_build.compiled(compiler, isa))
        except FxquantError as error:
            self.warn(f"the CPU kernels are not compiled: {error}. They will be at their first call")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(path) for path in self.place.glob("*.so"))]

    @property
    def place(self) -> Path:
        return Path(self.build_lib) / PLACE


class Wheel(bdist_wheel):
    """A wheel of this platform if it holds compiled kernels; of any Python 3, since Python is nothing to them."""

    def run(self) -> None:
        self.run_command("build")  # now it is known what there is
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        compiled = any((Path(self.get_finalized_command("build").build_lib) / PLACE).glob("*.so"))
        self.root_is_pure = not compiled
        platform = super().get_tag()[2]
        self.root_is_pure = True  # where files go
        return ("py3", "none", platform)


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})

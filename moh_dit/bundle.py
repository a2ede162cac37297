"""A pipeline folder with its code beside it: diffusers loads it alone, with trust_remote_code.

diffusers fetches one Python file for the pipeline and one for a component, and no package. So the
modules that the pipeline needs go into one generated file, which imports them as a package of its
own name; both places get that file.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

# File names: the first is diffusers' own for a pipeline.
PIPELINE, TRANSFORMER = "pipeline", "moh_dit_transformer"
CLASSES = {"pipeline": "MoHDiTPipeline", "transformer": "MoHDiTTransformer2DModel"}
PACKAGE = __package__ or "moh_dit"

QUOTES = "'" * 3

HEADER = """# MoHDiTPipeline and MoHDiTTransformer2DModel of moh-dit VERSION, with all they need.
#
# For diffusers' trust_remote_code=True; written by moh-dit, Apache-2.0. Below are modules of that
# package as they are, every line behind a bar: diffusers takes what looks like an import at the
# start of a line for one of this file.

import importlib
import importlib.abc
import importlib.util
import pathlib
import sys

PACKAGE = "NAME"
MODULES = {}
"""

FOOTER = """

class Modules(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    # Imports the package from the texts above.

    text = pathlib.Path(__file__).read_text(encoding="utf-8")  # to be saved with the weights again

    def find_spec(self, name, path=None, target=None):
        if name not in MODULES:
            return None
        folder = [] if any(module.startswith(name + ".") for module in MODULES) else None
        return importlib.util.spec_from_file_location(
            name, self.get_filename(name), loader=self, submodule_search_locations=folder
        )

    def get_filename(self, name):
        return __file__ + "/" + name.replace(".", "/") + ".py"

    def get_source(self, name):
        return "\\n".join(line[1:] for line in MODULES[name].splitlines()[1:]) + "\\n"

    def get_code(self, name):
        return compile(self.get_source(name), self.get_filename(name), "exec")


if PACKAGE not in sys.modules:
    sys.meta_path.append(Modules())
MoHDiTPipeline = importlib.import_module(PACKAGE + ".pipeline").MoHDiTPipeline
MoHDiTTransformer2DModel = importlib.import_module(
    PACKAGE + ".transformer"
).MoHDiTTransformer2DModel
"""


def is_bundled() -> bool:
    """Whether this code itself came beside weights."""
    return PACKAGE != "moh_dit"


def add_code(folder: Path) -> None:
    """Put the code into a saved pipeline folder and name it in ``model_index.json``."""
    text = bundle()
    (folder / f"{PIPELINE}.py").write_text(text, encoding="utf-8")
    (folder / "transformer" / f"{TRANSFORMER}.py").write_text(text, encoding="utf-8")
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    config["_class_name"] = [PIPELINE, CLASSES["pipeline"]]
    config["transformer"] = [TRANSFORMER, CLASSES["transformer"]]
    index.write_text(json.dumps(config, indent=2) + "\n")


def use_installed(config: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's configuration, with this package's classes in place of those beside it."""
    if not isinstance(config.get("_class_name"), list):
        return config
    transformer = [f"{PACKAGE}.transformer", CLASSES["transformer"]]
    return {**config, "_class_name": CLASSES["pipeline"], "transformer": transformer}


def bundle() -> str:
    """The generated file."""
    if is_bundled():
        return importlib.util.find_spec(PACKAGE).loader.text  # type: ignore[union-attr]
    sources = {
        name: file.read_text(encoding="utf-8") for name, file in sorted(needed_modules().items())
    }
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()
    name = f"moh_dit_{digest[:8]}"  # other code beside other weights is another package
    parts = [HEADER.replace("VERSION", moh_dit_version()).replace("NAME", name)]
    for module, source in sources.items():
        assert QUOTES not in source, f"{module} has the quotes that the bundle uses"
        lines = "\n".join(f"|{line}" for line in source.splitlines())
        parts.append(f"MODULES[PACKAGE + {module!r}] = r{QUOTES}\n{lines}\n{QUOTES}\n")
    return "".join(parts) + FOOTER


def moh_dit_version() -> str:
    """Of the package, or of the one that wrote the code beside the weights."""
    return importlib.import_module(PACKAGE).__version__


def needed_modules() -> dict[str, Path]:
    """The package, its pipeline, and what is imported at the top of a module; packages whole.

    By name within the package: ``""`` is the package itself, ``".attention"`` is ``attention.py``.
    """
    root = Path(__file__).parent
    found: dict[str, Path] = {}
    waiting = [root / "__init__.py", root / "pipeline.py"]
    while waiting:
        file = waiting.pop()
        name = _module_name(file, root)
        if name in found:
            continue
        found[name] = file
        if name and file.name == "__init__.py":
            waiting += file.parent.glob("*.py")
        waiting += [file.parent / "__init__.py", *_relative_imports(file)]
    return found


def _module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(["", *(part for part in parts if part != "__init__")])


def _relative_imports(file: Path) -> list[Path]:
    """Files of the package that a file imports at its top."""
    files = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in [base, *(base / alias.name for alias in node.names)]:
                files += [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
    return files

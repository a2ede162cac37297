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

from ..common.renamed import MODULES
from ..common.version import __version__

# File names: the first is diffusers' own for a pipeline.
PIPELINE, TRANSFORMER = "pipeline", "moh_dit_transformer"
CLASSES = {"pipeline": "MoHDiTPipeline", "transformer": "MoHDiTTransformer2DModel"}
PACKAGE = __name__.partition(".")[0]

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
MoHDiTPipeline = importlib.import_module(PACKAGE + ".pipeline.pipeline").MoHDiTPipeline
MoHDiTTransformer2DModel = importlib.import_module(
    PACKAGE + ".model.transformer"
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
    """Replace the classes that a pipeline's configuration names by those of this package."""
    named_here = config.get("transformer", [None])[0] in MODULES
    if not isinstance(config.get("_class_name"), list) and not named_here:
        return config
    transformer = [f"{PACKAGE}.model.transformer", CLASSES["transformer"]]
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
    parts = [HEADER.replace("VERSION", __version__).replace("NAME", name)]
    for module, source in sources.items():
        assert QUOTES not in source, f"{module} has the quotes that the bundle uses"
        lines = "\n".join(f"|{line}" for line in source.splitlines())
        parts.append(f"MODULES[PACKAGE + {module!r}] = r{QUOTES}\n{lines}\n{QUOTES}\n")
    return "".join(parts) + FOOTER


def needed_modules() -> dict[str, Path]:
    """List the package, its pipeline, and every module that these import.

    Keys are names within the package: ``""`` is the package itself, ``".model.attention"`` is
    ``model/attention.py``.
    """
    root = Path(__file__).parents[1]
    found: dict[str, Path] = {}
    waiting = [root / "__init__.py", root / "pipeline" / "pipeline.py"]
    while waiting:
        file = waiting.pop()
        name = _module_name(file, root)
        if name in found:
            continue
        found[name] = file
        waiting.append(file.parent / "__init__.py")
        if name:  # The package itself names more modules than the pipeline needs.
            waiting += _relative_imports(file)
    return found


def _module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(["", *(part for part in parts if part != "__init__")])


def _relative_imports(file: Path) -> list[Path]:
    """List the files of the package that a file imports, inside functions too."""
    files = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for path in [base, *(base / alias.name for alias in node.names)]:
                files += [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
    return files

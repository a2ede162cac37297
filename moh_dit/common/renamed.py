"""Map names in files of version 0.1.0 to present names."""

import sys

# Modules named in the `model_index.json` of a saved pipeline.
MODULES = {"moh_dit.transformer": "moh_dit.model.transformer"}
# Settings in YAML files and on the command line, by program.
SETTINGS: dict[str, dict[str, str]] = {
    "AutoencoderTrainingConfig": {"random_flip": "horizontal_flip", "initial": "init_from"},
    "EncodeConfig": {"flip": "horizontal_flip"},
}


def alias_modules() -> None:
    """Make imported modules available under their former names.

    diffusers looks up the module that ``model_index.json`` names in ``sys.modules``.
    """
    for former, present in MODULES.items():
        if present in sys.modules:
            sys.modules.setdefault(former, sys.modules[present])

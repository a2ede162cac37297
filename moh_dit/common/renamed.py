"""Names that files of version 0.1.0 contain, and what they are called now."""

# Modules that `model_index.json` of a saved pipeline may name.
MODULES = {"moh_dit.transformer": "moh_dit.model.transformer"}
# Settings in YAML files and on the command line, by program.
SETTINGS: dict[str, dict[str, str]] = {}

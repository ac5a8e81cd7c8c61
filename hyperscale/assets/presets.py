"""The DeepSpeed JSON files that we ship: `ds_configs/` of a checkout, `hyperscale/ds_configs` of a wheel."""

from pathlib import Path

from hyperscale.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent


def preset_folder() -> Path:
    """Return the folder of the shipped presets.

    Raises:
        ConfigError: the installation lost them.
    """
    for folder in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the DeepSpeed presets are missing beside {_PACKAGE}; install hypernet-scale again")


def find_preset(name: str) -> Path:
    """Return the JSON file of the preset called `name` (`zero3`).

    Raises:
        ConfigError: no preset has that name.
    """
    presets = {path.stem: path for path in sorted(preset_folder().glob("*.json"))}
    if name not in presets:
        raise ConfigError(
            f"no DeepSpeed preset '{name}': the shipped ones are {', '.join(presets)}.{nearest(name, presets)} "
            "A file of your own is named by its path, ending in .json"
        )
    return presets[name]

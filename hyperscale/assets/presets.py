"""The shipped DeepSpeed JSON files: `ds_configs/` in a checkout, `hyperscale/ds_configs` in a wheel."""

from pathlib import Path

from hyperscale.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent


def preset_folder() -> Path:
    """Return the folder of the shipped presets.

    Raises:
        ConfigError: the installation does not contain them.
    """
    for folder in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the DeepSpeed presets are missing next to {_PACKAGE}; reinstall hypernet-scale")


def find_preset(name: str) -> Path:
    """Return the JSON file of the preset called `name` (`zero3`).

    Raises:
        ConfigError: no preset has that name.
    """
    presets = {path.stem: path for path in sorted(preset_folder().glob("*.json"))}
    if name not in presets:
        raise ConfigError(
            f"no DeepSpeed preset '{name}': the shipped ones are {', '.join(presets)}.{nearest(name, presets)} "
            "To use your own file, give its path, which must end in .json"
        )
    return presets[name]

"""What torchrun runs in every worker that `torchrun.train_on_torchrun` starts: `FILE [--resume] [--debug]`."""

import json
import sys
from pathlib import Path

from hyperscale.config.loading import parse_recipe
from hyperscale.launch import torchrun
from hyperscale.logger import set_up_logging


def main(arguments: list[str]) -> None:
    """Run this worker's part of the resolved recipe in FILE, a JSON file."""
    file, *flags = arguments
    set_up_logging("DEBUG" if "--debug" in flags else None)
    recipe = parse_recipe(json.loads(Path(file).read_text("utf-8")), "the recipe")
    torchrun.train_as_worker(recipe, resume="--resume" in flags)
    torchrun.leave()


if __name__ == "__main__":
    main(sys.argv[1:])

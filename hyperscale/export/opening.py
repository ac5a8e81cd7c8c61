"""A trained generator from any source: a run folder, a checkpoint, or a saved generator."""

from hyperscale.checkpoint.store import find_checkpoint, load_checkpoint
from hyperscale.export.exporter import TrainedGenerator, restore_generator
from hyperscale.export.generator_folder import is_generator_folder, read_generator
from hyperscale.places import open_place


def open_generator(source: str) -> TrainedGenerator:
    """Restore a generator on the CPU; no backbone is loaded.

    Args:
        source: a run folder (its newest checkpoint is read) or a checkpoint, local or a URI, or a saved generator's
            folder on this machine.

    Raises:
        CheckpointError: there is no whole checkpoint.
        BundleError: a saved generator is damaged, incomplete or of a newer version.
    """
    place = open_place(source)
    if place.is_local and is_generator_folder(place.local_path):
        return read_generator(place.local_path)
    return restore_generator(load_checkpoint(find_checkpoint(source), only=("generator",)))

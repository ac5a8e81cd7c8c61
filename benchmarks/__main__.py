"""`make bench`: every benchmark, each in its own process group. Ratios within one run; absolute times mean little."""

import subprocess
import sys

from benchmarks.step import RANKS

COMMANDS = {
    "step": ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "benchmarks.step"],
    "memory": ["benchmarks.memory"],
}


def main() -> int:
    """Run all benchmarks, or those named on the command line; returns the first exit code that is not 0."""
    for name in sys.argv[1:] or COMMANDS:
        status = subprocess.run([sys.executable, "-m", *COMMANDS[name]], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

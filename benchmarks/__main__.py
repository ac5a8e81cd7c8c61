"""`make bench`: every benchmark, each in its own processes. Ratios within one run; absolute times mean little."""

import subprocess
import sys

BENCHMARKS = {"load": (), "step": ("--short",), "mixture": (), "profile": (), "memory": ("--short",)}
"""Name -> its options here, where all together are to take less than twenty minutes on two cores."""


def main() -> int:
    """Run all benchmarks, or those named on the command line; returns the first exit code that is not 0."""
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"\n{name}", flush=True)
        words = [f"benchmarks.{name}", *BENCHMARKS.get(name, ())]
        status = subprocess.run([sys.executable, "-m", *words], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

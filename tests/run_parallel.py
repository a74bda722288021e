"""Runs the test files by several processes of pytest at once: a machine with a GPU has many cores,
and no pytest-xdist.

python tests/run_parallel.py [--jobs N] [options of pytest]
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

TESTS = Path(__file__).parent
NO_TESTS = 5  # pytest's exit status where nothing was selected


def run_file(path: Path, options: list[str]) -> tuple[Path, float, subprocess.CompletedProcess]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", path, *options]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return path, time.perf_counter() - start, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=TESTS)
    args, options = parser.parse_known_args()
    # Long files first, by a guess from their sizes, so that none is left for the end.
    files = sorted(args.folder.glob("test_*.py"), key=lambda path: -path.stat().st_size)
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for job in as_completed([pool.submit(run_file, path, options) for path in files]):
            path, seconds, result = job.result()
            is_good = result.returncode in (0, NO_TESTS)
            lines = result.stdout.strip().splitlines() or ["no output"]
            print(f"{path.name} ({seconds:.0f} s): {lines[-1]}", flush=True)
            if not is_good:
                failed.append(path.name)
                print(result.stdout, flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"{len(files)} files passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

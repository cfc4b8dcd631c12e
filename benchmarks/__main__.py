"""`make bench`: run every benchmark, print a table each."""

from benchmarks import command_line, faults, idle, limits, windows

if __name__ == "__main__":
    for benchmark in (command_line, idle, faults, limits, windows):
        print(f"\n== {benchmark.__doc__.splitlines()[0]}")  # type: ignore[union-attr]
        benchmark.main()

"""CPU time of `hive --help`, beside a bare Python that does nothing (aim: under 250 ms)."""

import resource
import statistics
import subprocess
import sys

RUNS = 15


def cpu_ms(command: list[str]) -> float:
    """User and system time of one run, milliseconds, by the kernel's own account."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return 1000 * (user + system)


def main() -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "hive --help": [sys.executable, "-m", "hive", "--help"],
        "hive worker --help": [sys.executable, "-m", "hive", "worker", "--help"],
    }
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        cpu_ms(command)  # warm the file cache
    for _ in range(RUNS):  # interleaved: the machine's speed drifts
        for name, command in commands.items():
            samples[name].append(cpu_ms(command))
    bare = statistics.median(samples["python -c pass"])
    print(f"{'command':<22}{'min':>8}{'median':>8}{'max':>8}  ms CPU   ratio")
    for name, values in samples.items():
        middle = statistics.median(values)
        print(f"{name:<22}{min(values):8.0f}{middle:8.0f}{max(values):8.0f}{middle / bare:15.1f}")


if __name__ == "__main__":
    main()

"""`hive devices`: the GPUs that hive serves on, or, with --local, those of this host."""

from typing import Any

import click

from hive.cli.client import call, daemon_options
from hive.cli.output import json_option, print_json, print_table

MIB = 2**20


@click.command()
@click.option(
    "--local",
    is_flag=True,
    help="Ask this host's driver for every GPU, without a daemon; nothing is chosen or changed.",
)
@daemon_options
@json_option
def devices(local: bool, as_json: bool, **daemon: Any) -> None:
    """Show the GPUs: condition, memory, temperature, and which processes hold them."""
    found = _local() if local else call("GET", "/hive/v1/devices", **daemon)["devices"]
    if as_json:
        print_json({"devices": found})
        return
    rows = [
        (
            d["id"],
            d["uuid"],
            d["name"],
            d.get("state", ""),
            _mib(d.get("vram_total_bytes")),
            _mib(d.get("vram_free_bytes")),
            d.get("temperature_celsius"),
            ", ".join(_process(p) for p in d.get("processes", [])),
            d.get("reason", ""),
        )
        for d in found
    ]
    columns = ("device", "uuid", "name", "state", "MiB", "free", "°C", "processes", "reason")
    print_table(columns, rows)


def _local() -> list[dict[str, Any]]:
    """Raises CudaDriverMissing or CudaDeviceFailed."""
    from hive.devices import nvml
    from hive.devices.preflight import describe
    from hive.errors import HiveError

    driver = nvml.Driver()
    try:
        shown = []
        for device, wrong in driver.inventory():
            try:
                view = describe(device, None if wrong else driver.read(device.uuid))
            except HiveError as exc:
                view, wrong = describe(device, None), exc  # noqa: PLW2901 (as if it came with it)
            shown.append({**view, "reason": wrong.message} if wrong else view)
        return shown
    finally:
        driver.close()


def _process(process: dict[str, Any]) -> str:
    ours = " (hive)" if process["is_ours"] else ""
    return f"{process['pid']} {process['name']} {_mib(process['vram_bytes'])}{ours}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:.0f}"

"""`hive serve` runs the daemon, `hive check` tries everything but serving."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from hive.cli.output import error_body, json_option, lines_of, print_json, print_table, say
from hive.errors import HiveError
from hive.policy.visible import visible
from hive.settings import Settings, default_file, load

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="HIVE_CONFIG",
    help="Configuration file (default: ./hive.toml, then /etc/hive/hive.toml).",
)


def settings_options(command: Any) -> Any:
    for option in (
        click.option(
            "--runtime-dir", type=click.Path(path_type=Path), help="Overrides server.runtime_dir."
        ),
        click.option(
            "--state-dir", type=click.Path(path_type=Path), help="Overrides server.state_dir."
        ),
        click.option("--port", type=int, help="Overrides server.port."),
        click.option("--host", help="Overrides server.host."),
        config_option,
    ):
        command = option(command)
    return command


def _load(config: Path | None, **server: Any) -> Settings:
    return load(config, {"server": server})


@click.command()
@settings_options
def serve(config: Path | None, **server: Any) -> int:
    """Run the daemon in the foreground until SIGTERM or Ctrl+C.

    Fails before it listens, with the error as one line of JSON on stderr, when a device, a model
    or the configuration is not as it must be.
    """
    import uvloop

    from hive.daemon import serve as run
    from hive.telemetry import logs

    logs.configure()  # first: what is wrong must not wait for whoever reads stderr
    try:
        # A file that vanishes later must not make another one hive's.
        reread = partial(_load, config or default_file(), **server)
        settings = reread()
        logs.set_level(settings.server.log_level)
        uvloop.run(run(settings, reread))
    except HiveError as exc:
        _fail(exc)
        return exc.exit_code
    except BaseExceptionGroup as group:
        # The daemon's parts live in task groups: tell the one error that ended them.
        error = _first_error(group)
        if error is None:
            raise
        _fail(error)
        return error.exit_code
    return 0


def _first_error(group: BaseExceptionGroup[BaseException]) -> HiveError | None:
    for exc in group.exceptions:
        if isinstance(exc, HiveError):
            return exc
        if isinstance(exc, BaseExceptionGroup) and (found := _first_error(exc)):
            return found
    return None


def _fail(error: HiveError) -> None:
    """People read the lines, programs the last one (contract, Command line)."""
    from hive.telemetry.logs import tell

    lines = [*map(visible, lines_of(error)), json.dumps(error_body(error))]
    tell("".join(f"{line}\n" for line in lines))


@click.command()
@settings_options
@json_option
def check(config: Path | None, as_json: bool, **server: Any) -> int:
    """Run the whole preflight without serving, and import each engine's environment.

    Exit code 0 when nothing is wrong with configuration, devices, engines and models, 1 otherwise;
    whether the port is free and no other hive runs is seen by `hive serve` alone.
    """
    from hive.cli.installing import sigterm_unwinds
    from hive.devices.nvml import Driver
    from hive.workers import preflight

    settings = _load(config, **server)
    preflight.prepare_directories(settings)
    driver = Driver(settings.server.driver_call_s)
    with sigterm_unwinds():  # an engine's Python that is being asked ends with us
        findings, _ = preflight.check(
            settings, driver, imports=True, own=lambda: preflight.own_processes(settings)
        )
    driver.close()
    wrong = [finding for finding in findings if finding.error]
    if as_json:
        print_json(
            {
                "ok": not wrong,
                "findings": [
                    {
                        "subject": f.subject,
                        "found": f.found,
                        "ok": f.error is None,
                        "error": error_body(f.error)["error"] if f.error else None,
                    }
                    for f in findings
                ],
            }
        )
    else:
        rows = [
            ("wrong" if f.error else "ok", f.subject, f.found, f.error.code if f.error else "")
            for f in findings
        ]
        print_table(("", "what", "found", "code"), rows)
        for finding in wrong:
            assert finding.error
            say(f"what to do: {finding.error.suggested_action}")
    if wrong:
        error = preflight.worst([finding.error for finding in wrong if finding.error])
        print(json.dumps(error_body(error)), file=sys.stderr, flush=True)
    return 1 if wrong else 0

"""The command line: operator commands over HTTP, and `serve`, which starts the daemon.

Commands are imported when they are asked for, so that `hive --help` stays quick.
"""

import sys
from importlib import import_module

import click

from hive import __version__
from hive.cli import streams
from hive.errors import HiveError

# Name -> (module, attribute, help line). The help stands here so that listing imports nothing.
COMMANDS = {
    "serve": ("hive.cli.serve", "serve", "Run the daemon in the foreground."),
    "check": ("hive.cli.serve", "check", "Try the configuration without serving."),
    "status": ("hive.cli.status", "status", "Show the daemon, its models and workers."),
    "alerts": ("hive.cli.alerts", "alerts", "Show what escalated, and what waits to be sent."),
    "health": ("hive.cli.health", "health", "Say whether hive and all of its parts are well."),
    "test-connection": (
        "hive.cli.health",
        "test_connection",
        "Ask the engines or LMCache alone whether they answer.",
    ),
    "worker": (
        "hive.cli.worker",
        "worker",
        "List, show, start, stop, drain, restart and release workers; read logs.",
    ),
    "session": ("hive.cli.session", "session", "List, show, make and delete sessions."),
    "window": (
        "hive.cli.window",
        "window",
        "Freeze, thaw, list, show, clone, delete, diagnose and repair windows.",
    ),
    "backup": ("hive.cli.backup", "backup", "Create, list, restore and delete backups of windows."),
    "devices": (
        "hive.cli.devices",
        "devices",
        "Show the GPUs: condition, memory, and who holds them.",
    ),
    "reload": ("hive.cli.reload", "reload", "Read the configuration again, without a restart."),
    "audit": ("hive.cli.audit", "audit", "Show who did what, and prove that nobody changed it."),
    "leaks": ("hive.cli.leaks", "leaks", "Show what workers did not give back."),
    "sweep": ("hive.cli.leaks", "sweep", "Clear what a hive that was killed left behind."),
    "key": ("hive.cli.key", "key", "Make, list and revoke API keys."),
    "mcp": ("hive.cli.mcp", "mcp", "Serve hive's tools to agents, over stdio or HTTP."),
    "explain": ("hive.cli.explain", "explain", "Say what an error code means and what to do."),
    "engine": ("hive.cli.engine", "engine", "Install the managed engine environment."),
    "model": ("hive.cli.model", "model", "Make the tiny random-weight model."),
}


class LazyGroup(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            raise streams.ReaderLeft from exc

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hive")
def hive() -> None:
    """One daemon per GPU host: it owns inference engines and serves their models.

    Exit codes: 0 success, 1 error, 2 wrong usage, 70 internal error, 124 timeout, 130 Ctrl+C,
    137 killed, 255 daemon not reachable.
    """


def main(args: list[str]) -> int:
    """Run one command on this process' own standard output; the exit status."""
    streams.take_over()
    try:
        return run(args)
    except streams.ReaderLeft:  # `hive status | head`: that is no failure of ours
        return 0
    except streams.OutputLost as exc:
        print(f"hive: the output could not be written: {exc}", file=sys.stderr)
        return 1


def run(args: list[str]) -> int:
    """Run one command; the exit status."""
    try:
        result = hive.main(args, prog_name="hive", standalone_mode=False)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.Abort:
        return 130
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except HiveError as exc:
        from hive.cli.output import show_error

        show_error(exc, as_json="--json" in args)
        return exc.exit_code
    finally:
        sys.stdout.flush()
    return result if isinstance(result, int) else 0

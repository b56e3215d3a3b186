"""The QMP commands of the guest: QEMU's names and arguments, onto the machine and its migration.

Source: QEMU's qapi/{control,run-state,migration,misc}.json. `x-guest-report` and `x-guest-verify`
are our own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lab.guest.errors import GuestError
from lab.guest.machine import Machine, RunState
from lab.guest.migration import Migration
from lab.guest.object_model import ObjectModel
from lab.guest.qmp_server import GREETING, Command, CommandError
from sync.vmm.qmp import JsonObject

_MAX_CAPABILITIES = 64


def commands(
    machine: Machine, migration: Migration, quit_guest: Callable[[], None]
) -> Mapping[str, Command]:
    """The table that `QmpServer` serves."""

    def nothing(action: Callable[[], None]) -> Command:
        def execute(_arguments: JsonObject) -> JsonObject:
            action()
            return {}

        return execute

    def query_status(_arguments: JsonObject) -> JsonObject:
        state = machine.state
        return {"status": str(state), "running": state is RunState.RUNNING}

    def set_capabilities(arguments: JsonObject) -> JsonObject:
        migration.set_capabilities(_capabilities_of(arguments))
        return {}

    def set_parameters(arguments: JsonObject) -> JsonObject:
        migration.set_parameters(arguments)
        return {}

    def migrate(arguments: JsonObject) -> JsonObject:
        migration.start_outgoing(_text(arguments, "uri"))
        return {}

    def migrate_incoming(arguments: JsonObject) -> JsonObject:
        migration.start_incoming(_text(arguments, "uri"))
        return {}

    def migrate_continue(arguments: JsonObject) -> JsonObject:
        migration.proceed(_text(arguments, "state"))
        return {}

    qom = ObjectModel(machine.options.device_path)
    table: dict[str, Command] = {
        "query-version": lambda _: GREETING["QMP"]["version"],
        "query-status": query_status,
        "stop": nothing(machine.stop),
        "cont": nothing(machine.cont),
        "quit": nothing(quit_guest),
        "query-migrate": lambda _: migration.query(),
        "query-migrate-capabilities": lambda _: migration.capabilities(),
        "migrate-set-capabilities": set_capabilities,
        "query-migrate-parameters": lambda _: migration.parameters(),
        "migrate-set-parameters": set_parameters,
        "migrate": migrate,
        "migrate-incoming": migrate_incoming,
        "migrate-continue": migrate_continue,
        "migrate_cancel": nothing(migration.cancel),
        "qom-list": lambda arguments: qom.list(_text(arguments, "path")),
        "qom-get": lambda arguments: qom.get(
            _text(arguments, "path"), _text(arguments, "property")
        ),
        "x-guest-report": lambda _: machine.report(),
        "x-guest-verify": lambda _: {"number": machine.start_verification()},
    }
    return {name: _with_errors(command) for name, command in table.items()}


def _with_errors(command: Command) -> Command:
    def execute(arguments: JsonObject) -> Any:
        try:
            return command(arguments)
        except GuestError as error:
            raise CommandError(str(error)) from error

    return execute


def _text(arguments: JsonObject, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise CommandError(f"Parameter '{name}' is missing")
    return value


def _capabilities_of(arguments: JsonObject) -> dict[str, bool]:
    entries = arguments.get("capabilities")
    if not isinstance(entries, list) or len(entries) > _MAX_CAPABILITIES:
        raise CommandError("Parameter 'capabilities' is missing")
    wanted: dict[str, bool] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise CommandError("Invalid parameter type for 'capabilities'")
        name, state = entry.get("capability"), entry.get("state")
        if not isinstance(name, str) or not isinstance(state, bool):
            raise CommandError("Invalid parameter type for 'capabilities'")
        wanted[name] = state
    return wanted

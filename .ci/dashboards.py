"""Holds dashboards against Grafana's schema: read into the SDK's types and written again, every key must still be there.

A misspelt option would be dropped, and Grafana would ignore it just as silently. Units must be ones that Grafana knows.
Usage: dashboards.py FILE...
"""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}


def missing(before, after, path=""):
    """The keys and values of `before` that `after` does not have."""
    if isinstance(before, dict):
        if not isinstance(after, dict):
            yield path
            return
        for key, value in before.items():
            if key not in after:
                # Nothing is what the SDK writes for nothing.
                if value is not None:
                    yield f"{path}.{key}"
            else:
                yield from missing(value, after[key], f"{path}.{key}")
    elif isinstance(before, list):
        if not isinstance(after, list) or len(after) != len(before):
            yield path
            return
        for i, value in enumerate(before):
            yield from missing(value, after[i], f"{path}[{i}]")
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


def units_of(node):
    if isinstance(node, dict):
        if isinstance(node.get("unit"), str):
            yield node["unit"]
        for value in node.values():
            yield from units_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from units_of(value)


def main():
    register_default_plugins()
    faults = 0
    for file in sys.argv[1:]:
        with open(file, encoding="utf-8") as opened:
            before = json.load(opened)
        after = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(before)))
        lost = list(missing(before, after))
        unknown = sorted(set(units_of(before)) - UNITS)
        for what in lost:
            print(f"{file}: lost by the round trip: {what}", file=sys.stderr)
        for unit in unknown:
            print(f"{file}: no unit of Grafana's: {unit}", file=sys.stderr)
        faults += len(lost) + len(unknown)
        print(f"dashboards: {file}: {len(before['panels'])} panels and rows, {len(lost)} keys lost, {len(unknown)} unknown units")
    sys.exit(1 if faults else 0)


main()

#!/usr/bin/env python3
"""Prints the Grafana dashboard, which the chart holds as sluice/monitoring/dashboard.json:

    charts/monitoring/dashboard.py >charts/sluice/monitoring/dashboard.json && config/render.sh
"""
import json

WIDTH, HEIGHT = 24, 7
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Of the Mirrors that are chosen above.
M = 'namespace=~"$namespace", mirror=~"$mirror"'
BY = "namespace, mirror"
NAME = "{{namespace}}/{{mirror}}"


def w(metric, matchers=""):
    """A worker's metric, of the Mirrors that are chosen."""
    return f"sluice_worker_{metric}{{{M}{', ' + matchers if matchers else ''}}}"


def most(metric, matchers=""):
    """One series for each Mirror: while a worker is replaced there may be two pods."""
    return f"max by ({BY}) ({w(metric, matchers)})"


def per_second(metric, by=BY):
    return f"sum by ({by}) (rate({w(metric)}[$__rate_interval]))"


def quantile(share):
    return f"histogram_quantile({share}, sum by ({BY}, le) (rate({w('latency_seconds_bucket')}[$__rate_interval])))"


def target(expression, legend="", **more):
    return {"datasource": SOURCE, "editorMode": "code", "expr": expression, "legendFormat": legend or "__auto", **more}


def panel(kind, title, targets, unit="short", help="", width=8, options=None, custom=None, defaults=None):
    if isinstance(targets, str):
        targets = [target(targets, NAME)]
    for letter, each in zip("ABCDEFGH", targets):
        each["refId"] = letter
    field = {"unit": unit, "custom": custom or {}, **(defaults or {})}
    return {"type": kind, "title": title, "description": help, "datasource": SOURCE, "targets": targets, "width": width,
            "fieldConfig": {"defaults": field, "overrides": []}, "options": options or {}}


def lines(title, targets, unit="short", help="", width=8, stack=False, least=0):
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 25 if stack else 5, "showPoints": "never", "spanNulls": False,
              "stacking": {"mode": "normal" if stack else "none", "group": "A"}}
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return panel("timeseries", title, targets, unit, help, width, options, custom, {"min": least} if least is not None else {})


def number(title, expression, unit="short", help="", width=4, steps=((None, "green"), (1, "red"))):
    thresholds = {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in steps]}
    options = {"colorMode": "value", "graphMode": "area", "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return panel("stat", title, [target(expression, title)], unit, help, width, options, defaults={"thresholds": thresholds, "noValue": "0"})


def table(title, queries, help):
    targets = [target(each, format="table", instant=True) for each in queries]
    hide = {"id": "organize", "options": {"excludeByName": {"Time": True}}}
    return panel("table", title, targets, help=help) | {"transformations": [{"id": "merge", "options": {}}, hide]}


def bars(title, expression, unit, help, width=8):
    thresholds = {"mode": "absolute", "steps": [{"color": "blue", "value": None}]}
    options = {"displayMode": "gradient", "orientation": "horizontal", "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return panel("bargauge", title, expression, unit, help, width, options, defaults={"min": 0, "max": 1, "thresholds": thresholds})


TABLES_IN_ERROR = 'state="Error"'
PLAIN = ((None, "blue"),)
PHASES = (("Starting", "light-blue"), ("SettingUp", "blue"), ("Copying", "purple"), ("CatchingUp", "yellow"), ("Streaming", "green"),
          ("Suspended", "gray"), ("Retrying", "orange"), ("Stopped", "red"))


def phase(word):
    return f'phase="{word}"'


ROWS = {
    "Overview": [
        number("Mirrors", f"count(count by ({BY}) ({w('phase')}))", steps=PLAIN),
        number("Streaming", f"count({most('phase', phase('Streaming'))} == 1)", steps=PLAIN),
        number("Stopped", f"count({most('phase', phase('Stopped'))} == 1)", help="They need a human."),
        number("Failing", f"count({most('failures_in_a_row')} > 0)", help="Their last session has failed."),
        number("Suspended", f"count({most('phase', phase('Suspended'))} == 1)", steps=((None, "green"), (1, "orange"))),
        number("Tables in error", f"sum({most('tables', TABLES_IN_ERROR)})"),
        panel("state-timeline", "Phases", " + ".join(f"{number} * {most('phase', phase(word))}" for number, (word, _) in enumerate(PHASES)), width=24,
              help="The phase that each Mirror is in.", defaults={"mappings": [{"type": "value", "options": {
                  str(number): {"index": number, "text": word, "color": color} for number, (word, color) in enumerate(PHASES)}}]},
              options={"showValue": "auto", "mergeValues": True, "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}}),
        lines("Lag in seconds", most("lag_seconds"), "s", "Age of the last transaction applied while more is waiting; 0 when level. Absent without a session."),
        lines("Lag in bytes", most("lag_bytes"), "bytes", "Log of the source that is not applied; without a session, not confirmed."),
        lines("Latency, 99th percentile", quantile(0.99), "s", "From the source's commit to the target's."),
        lines("Rows", [target(per_second("rows_total", f"{BY}, op"), NAME + " {{op}}")], "rowsps", "Written from the stream.", width=12),
        lines("Bytes", per_second("bytes_applied_total"), "Bps", "Of the batches applied.", width=12),
    ],
    "Initial copy": [
        bars("Copied", f"clamp_max({most('rows_copied')} / ({most('rows_to_copy')} > 0), 1)", "percentunit", "Rows to copy are estimated by the source's statistics."),
        lines("Rows copied", f"clamp_min(max by ({BY}) (deriv({w('rows_copied')}[$__rate_interval])), 0)", "rowsps"),
        lines("Tables by state", [target(f"sum by (state) (max by ({BY}, state) ({w('tables')}))", "{{state}}")], stack=True),
    ],
    "Apply": [
        lines("Batches", per_second("batches_total"), "ops"),
        lines("Rows in a batch", f"{per_second('rows_total')} / ({per_second('batches_total')} > 0)", help="Small ones cost throughput, large ones latency."),
        lines("Bytes in a batch", f"{per_second('bytes_applied_total')} / ({per_second('batches_total')} > 0)", "bytes"),
        lines("Sessions begun", f"sum by ({BY}) (increase({w('sessions_total')}[$__rate_interval]))", help="Each but the first is a restart."),
        lines("Sessions that failed", [target(f"sum by ({BY}, class) (increase({w('failures_total')}[$__rate_interval]))", NAME + " {{class}}")]),
        lines("Epoch", most("epoch"), help="Grows with each session, across pods.", least=None),
    ],
    "Latency": [
        panel("heatmap", "From the source's commit to the target's",
              [target(f"sum by (le) (increase({w('latency_seconds_bucket')}[$__rate_interval]))", "{{le}}", format="heatmap")], "s", width=12,
              help="Transactions, and heartbeats where nothing is written.",
              options={"calculate": False, "cellGap": 0, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
                       "yAxis": {"unit": "s"}, "legend": {"show": True}, "tooltip": {"mode": "single", "yHistogram": True}}),
        lines("Quantiles", [target(quantile(share), f"{NAME} {share}") for share in (0.5, 0.95, 0.99)], "s", width=12),
    ],
    "Memory and spill": [
        lines("Memory of changes", most("log_memory_bytes"), "bytes", "Changes until they are applied, and transactions that have not ended."),
        lines("Memory in use", f"{most('log_memory_bytes')} / {most('log_memory_limit_bytes')}", "percentunit", "At 100 % nothing is read until changes have been applied."),
        lines("Written before the end", most("early_bytes"), "bytes", "Changes of a transaction that has not ended on the source."),
        lines("Spill", most("spill_bytes"), "bytes", "Files of transactions that have not ended."),
        lines("Spill in use", f"{most('spill_bytes')} / ({most('spill_limit_bytes')} > 0)", "percentunit"),
        lines("Spill full", most("spill_full"), help="1 while large transactions are received at their end only."),
    ],
    "Slots": [
        lines("Kept for the slot", most("slot_retained_bytes"), "bytes", "Log that the source keeps."),
        lines("Left before the slot is lost", f"min by ({BY}) ({w('slot_safe_bytes')})", "bytes", "Absent when max_slot_wal_keep_size is unlimited."),
        lines("Share left", f"min by ({BY}) ({w('slot_safe_bytes')} / ({w('slot_safe_bytes')} + {w('slot_retained_bytes')}))", "percentunit", "SlotAtRisk below a fifth."),
        lines("Slot is there", most("slot_exists"), width=12),
        lines("Slot is lost", most("slot_lost"), width=12),
    ],
    "Operator": [
        number("Leaders", "sum(sluice_operator_leader)", steps=((None, "red"), (1, "green"))),
        number("Sources and Targets not ready", 'sum(sluice_operator_resources{kind=~"Source|Target", ready="false"})'),
        number("Mirrors not ready", 'sum(sluice_operator_resources{kind="Mirror", ready="false"})'),
        number("Workers out of reach", 'sum(sluice_operator_workers{phase="Unreachable"})'),
        number("Orphaned slots", "max(sluice_operator_orphaned_slots)", help="Left on their sources by deleted Mirrors; event and log name them."),
        number("Missing permissions", "max(sluice_operator_missing_permissions)", help="Rules that the operator's role lacks."),
        lines("Workers by phase", [target("sum by (phase) (sluice_operator_workers)", "{{phase}}")], stack=True),
        lines("Passes by outcome", [target("sum by (controller, outcome, class) (rate(sluice_operator_reconcile_total[$__rate_interval]))", "{{controller}} {{outcome}} {{class}}")], "ops"),
        lines("Time of a pass, 99th percentile",
              [target("histogram_quantile(0.99, sum by (controller, le) (rate(sluice_operator_reconcile_duration_seconds_bucket[$__rate_interval])))", "{{controller}}")], "s"),
        lines("Passes that run", [target("sum by (controller) (sluice_operator_inflight)", "{{controller}}")]),
        lines("Time since a watch was heard", [target("time() - max by (namespace, pod, kind) (sluice_operator_watch_last_event_timestamp_seconds)", "{{kind}}")], "s", "Beyond 350 s the liveness probe fails."),
        lines("Errors of watches", [target("sum by (kind) (increase(sluice_operator_watch_errors_total[$__rate_interval]))", "{{kind}}"),
                                    target("sum by (kind) (increase(sluice_operator_undecodable_objects_total[$__rate_interval]))", "{{kind}} undecodable")]),
        lines("Requests to the API server", [target("sum by (verb, resource, code) (rate(sluice_operator_api_requests_total[$__rate_interval]))", "{{verb}} {{resource}} {{code}}")], "reqps", "Code 0: no answer."),
        lines("Writes", [target("sum by (kind) (rate(sluice_operator_status_writes_total[$__rate_interval]))", "status of {{kind}}"),
                         target("sum by (kind, result) (rate(sluice_operator_apply_total[$__rate_interval]))", "{{kind}} {{result}}"),
                         target("sum by (result) (rate(sluice_operator_events_total[$__rate_interval]))", "event {{result}}")], "ops"),
        lines("Polls of workers", [target("sum by (result) (rate(sluice_operator_poll_total[$__rate_interval]))", "{{result}}")], "ops"),
        lines("Time of a poll, 99th percentile", [target("histogram_quantile(0.99, sum by (le) (rate(sluice_operator_poll_duration_seconds_bucket[$__rate_interval])))", "99 %")], "s"),
        lines("Lease", [target("sum by (pod) (sluice_operator_leader)", "{{pod}} leads"),
                        target("sum by (pod) (increase(sluice_operator_lease_renew_failures_total[$__rate_interval]))", "{{pod}} failed to renew")]),
        table("Releases", ["count by (release) (sluice_operator_build_info)", f"count by (version) ({w('build_info')})"],
              "Replicas of the operator by release, workers by version."),
    ],
}


def layout():
    """Rows and panels with their places."""
    panels, y, number_of = [], 0, 0
    for title, items in ROWS.items():
        number_of += 1
        panels.append({"id": number_of, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y}})
        y, x, high = y + 1, 0, 0
        for item in items:
            number_of += 1
            width, height = item.pop("width"), 4 if item["type"] == "stat" else HEIGHT
            if x + width > WIDTH:
                x, y, high = 0, y + high, 0
            panels.append({"id": number_of, **item, "gridPos": {"h": height, "w": width, "x": x, "y": y}})
            x, high = x + width, max(high, height)
        y += high
    return panels


def choice(name, query, label):
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name}, "definition": query,
            "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "refresh": 2, "sort": 1}


def dashboard():
    return {
        "uid": "sluice", "title": "Sluice", "tags": ["sluice", "change-data-capture"], "editable": True, "schemaVersion": 39, "version": 1,
        "refresh": "30s", "time": {"from": "now-3h", "to": "now"}, "timezone": "browser", "graphTooltip": 1,
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}, "refresh": 1},
            choice("namespace", "label_values(sluice_worker_phase, namespace)", "Namespace"),
            choice("mirror", 'label_values(sluice_worker_phase{namespace=~"$namespace"}, mirror)', "Mirror"),
        ]},
        "annotations": {"list": []}, "links": [], "panels": layout(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1, ensure_ascii=False))

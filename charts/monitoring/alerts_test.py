"""Cases for `promtool test rules`: when each alert fires, and when it stays silent. Times are in minutes.

In each case a healthy Mirror (calm) and a healthy operator are there too, and all alerts that fire are compared: so a case
also proves that nothing else fires."""
import re

import yaml

END = 240
PHASES = ("Starting", "SettingUp", "Copying", "CatchingUp", "Streaming", "Suspended", "Retrying", "Stopped")
GIB = 1 << 30


def flat(value, minutes=END):
    return f"{value}+0x{minutes}"


def then(first, minutes, second):
    """One value for some minutes, another one from then on."""
    return f"{first}+0x{minutes - 1} {second}+0x{END - minutes}"


def turns(*values):
    """These values in turn, a minute each."""
    return " ".join(str(values[n % len(values)]) for n in range(END))


def in_phase(phase, since=0):
    off = {f'phase{{phase="{other}"}}': flat(0) for other in PHASES}
    if since:
        return off | {'phase{phase="Streaming"}': then(1, since, 0), f'phase{{phase="{phase}"}}': then(0, since, 1)}
    return off | {f'phase{{phase="{phase}"}}': flat(1)}


WORKER = in_phase("Streaming") | {
    "up": flat(1), "failures_in_a_row": flat(0), "epoch": flat(3), "rows_copied": flat(1000),
    'tables{state="Ready"}': flat(5), "lag_seconds": flat(0), "lag_bytes": flat(500),
    "slot_exists": flat(1), "slot_lost": flat(0), "slot_retained_bytes": flat(10**6), "slot_safe_bytes": flat(10**10),
    "wal_budget_warn_bytes": flat(100 * GIB),
    "spill_bytes": flat(0), "spill_limit_bytes": flat(10**9), "spill_full": flat(0),
    'latency_seconds_bucket{le="0.512"}': "0+60x240", 'latency_seconds_bucket{le="131.072"}': "0+60x240",
    'latency_seconds_bucket{le="+Inf"}': "0+60x240",
}
OPERATOR = {
    "up": flat(1), "leader": flat(1), 'leader{pod="op-2"}': flat(0),
    'reconcile_total{controller="mirror",outcome="success",class=""}': "0+10x240",
    'watch_last_event_timestamp_seconds{kind="Mirror"}': "0+60x240", 'watch_errors_total{kind="Mirror"}': flat(1),
    "missing_permissions": flat(0), "orphaned_slots": flat(0), "slots_without_mirror": flat(0), 'workers{phase="Streaming"}': flat(2),
    **{f'resources{{kind="{kind}",ready="{ready}"}}': flat(2 if ready == "true" else 0)
       for kind in ("Source", "Target", "Mirror") for ready in ("true", "false")},
}
ODD = {"namespace": "shop", "mirror": "odd"}
OP = {"namespace": "sluice-system"}

CASES = []


def case(alert, what, worker=None, operator=None, fires=None, silent=(), labels=None, also=()):
    """`alert` fires at `fires`, with `labels`, and is silent at `silent`; `also` fires beside it. Series of None are absent."""
    labels = (ODD if worker is not None else OP) if labels is None else labels
    CASES.append((alert, what, worker, operator, fires, silent, labels, also))


case("SluiceWorkerDown", "no scrape succeeds", worker={"up": then(1, 30, 0)}, silent=[35], fires=45)
case("SluiceWorkerDown", "two scrapes in three fail", worker={"up": turns(1, 0, 0)}, fires=60)
case("SluiceWorkerDown", "one scrape in three fails", worker={"up": turns(1, 0, 1)}, silent=[60, 90])
case("SluiceMirrorStopped", "stopped, with a try now and then",
     worker=in_phase("Stopped") | {'phase{phase="Stopped"}': turns(1, 1, 1, 0), 'phase{phase="Starting"}': turns(0, 0, 0, 1),
                                   "failures_in_a_row": "1+1x240", "lag_seconds": None}, silent=[2], fires=20)
case("SluiceMirrorStopped", "stopped for a moment",
     worker={'phase{phase="Stopped"}': "0+0x30 1+0x2 0+0x200", 'phase{phase="Streaming"}': "1+0x30 0+0x2 1+0x200"}, silent=[31, 34, 37, 39, 60])
case("SluiceMirrorRetrying", "the source stays away",
     worker={'phase{phase="Retrying"}': turns(1, 0), 'phase{phase="Starting"}': turns(0, 1), 'phase{phase="Streaming"}': flat(0),
             "failures_in_a_row": "1+1x240", "lag_seconds": None}, silent=[5], fires=15)
case("SluiceMirrorRetrying", "a short outage",
     worker={'phase{phase="Retrying"}': "0+0x29 1+0x4 0+0x200", "failures_in_a_row": "0+0x29 1+1x4 0+0x200"}, silent=[33, 40, 60])
case("SluiceWorkerRestarting", "a session each eight minutes", worker={"epoch": " ".join(str(3 + n // 8) for n in range(END))},
     silent=[49], fires=60)
case("SluiceWorkerRestarting", "a new pod that has not claimed yet", worker={"epoch": then(100, 60, 0)}, silent=[61, 90])
case("SluiceMirrorSuspended", "suspended for more than two hours, with scrapes that fail",
     worker=in_phase("Suspended") | {'phase{phase="Suspended"}': "1+0x60 _x5 1+0x170", "lag_seconds": None}, silent=[110], fires=130)
case("SluiceMirrorSuspended", "resumed",
     worker={'phase{phase="Suspended"}': then(1, 130, 0), 'phase{phase="Streaming"}': then(0, 130, 1)}, silent=[100, 131, 140])
case("SluiceTableError", "a table fails", worker={'tables{state="Error"}': then(0, 10, 1)}, silent=[12], fires=20)
case("SluiceCopyStalled", "no row is copied", worker=in_phase("Copying") | {"rows_copied": then(7, 20, 8)}, silent=[60], fires=100)
case("SluiceCopyStalled", "rows are copied", worker=in_phase("Copying") | {"rows_copied": "0+1000x240"}, silent=[100, 200])
case("SluiceLagSeconds", "behind by more than five minutes", worker={"lag_seconds": flat(301)}, silent=[5], fires=15)
case("SluiceLagSeconds", "behind by five minutes", worker={"lag_seconds": flat(300)}, silent=[15, 60])
case("SluiceLagBytes", "more than 10 GiB are waiting", worker={"lag_bytes": flat(10 * GIB + 1)}, silent=[10], fires=20)
case("SluiceLagBytes", "10 GiB are waiting", worker={"lag_bytes": flat(10 * GIB)}, silent=[20, 60])
case("SluiceLagBytes", "they wait while tables are copied",
     worker=in_phase("Copying") | {"lag_bytes": flat(20 * GIB), "rows_copied": "0+1000x240"}, silent=[20, 60])
case("SluiceLatencyHigh", "two of a hundred are late",
     worker={'latency_seconds_bucket{le="0.512"}': "0+98x240", 'latency_seconds_bucket{le="131.072"}': "0+100x240",
             'latency_seconds_bucket{le="+Inf"}': "0+100x240"}, silent=[5], fires=20)
case("SluiceLatencyHigh", "one of two hundred is late",
     worker={'latency_seconds_bucket{le="0.512"}': "0+199x240", 'latency_seconds_bucket{le="131.072"}': "0+200x240",
             'latency_seconds_bucket{le="+Inf"}': "0+200x240"}, silent=[20, 60])
case("SluiceSlotRetention", "more than 50 GiB are kept, without a bound",
     worker={"slot_retained_bytes": flat(50 * GIB + 1), "slot_safe_bytes": None}, silent=[10], fires=20)
case("SluiceSlotRetention", "50 GiB are kept", worker={"slot_retained_bytes": flat(50 * GIB), "slot_safe_bytes": flat(50 * GIB)}, silent=[20, 60])
case("SluiceWalBudget", "more than warnBytes", worker={"slot_retained_bytes": then(100, 30, 101), "wal_budget_warn_bytes": flat(100)},
     silent=[29, 30], fires=33)
case("SluiceWalBudget", "no budget", worker={"slot_retained_bytes": flat(10**9), "wal_budget_warn_bytes": None}, silent=[10, 60])
case("SluiceSlotFilling", "40 GB with 100 MB more each minute",
     worker={"slot_retained_bytes": "1000000000+100000000x240", "slot_safe_bytes": "40000000000-100000000x240"},
     silent=[10, 100, 165], fires=200)
case("SluiceSlotFilling", "the same use, with confirmations",
     worker={"slot_retained_bytes": turns(*range(10**6, 10**9, 10**8)), "slot_safe_bytes": turns(*range(10**10, 9 * 10**9, -10**8))},
     silent=[60, 200])
case("SluiceSlotAtRisk", "less than a fifth is left", worker={"slot_retained_bytes": flat(80), "slot_safe_bytes": then(20, 30, 19)},
     silent=[29, 30], fires=33)
case("SluiceSlotLost", "the source has invalidated it",
     worker={"slot_lost": then(0, 30, 1), "slot_safe_bytes": None, "slot_retained_bytes": None}, silent=[30], fires=33)
case("SluiceSlotLost", "somebody has dropped it", worker={"slot_exists": then(1, 30, 0)}, silent=[30], fires=33)
case("SluiceSlotLost", "it has not been made yet", worker=in_phase("Starting") | {"slot_exists": then(0, 60, 1)}, silent=[30, 61, 90])
case("SluiceSpillNearFull", "more than four fifths", worker={"spill_bytes": flat(810_000_000)}, silent=[3], fires=10)
case("SluiceSpillNearFull", "four fifths, or no spill at all", worker={"spill_bytes": flat(800_000_000)}, silent=[10, 60])
case("SluiceSpillNearFull", "a worker without a spill", worker={"spill_limit_bytes": flat(0)}, silent=[10, 60])
case("SluiceSpillFull", "full", worker={"spill_full": flat(1)}, silent=[3], fires=10)
case("SluiceOperatorDown", "no replica is scraped", operator={"up": then(1, 10, 0)}, silent=[12], fires=20, labels={})
case("SluiceOperatorNoLeader", "all replicas wait", operator={"leader": then(1, 10, 0)}, silent=[11], fires=15)
case("SluiceOperatorNoLeader", "another one takes over",
     operator={"leader": then(1, 10, 0), 'leader{pod="op-2"}': then(0, 11, 1)}, silent=[11, 15, 30])
FAILS = 'reconcile_total{controller="mirror",outcome="failure",class="transient"}'
case("SluiceOperatorReconcileErrors", "more than half of the passes fail", operator={FAILS: "0+11x240"}, silent=[10], fires=30,
     labels=OP | {"controller": "mirror"})
case("SluiceOperatorReconcileErrors", "less than half of them fail", operator={FAILS: "0+9x240"}, silent=[30, 60])
case("SluiceOperatorReconcileErrors", "wrong specs fail",
     operator={'reconcile_total{controller="mirror",outcome="failure",class="invalid"}': "0+100x240"}, silent=[30, 60])
BUG = 'reconcile_total{controller="mirror",outcome="panic",class="bug"}'
case("SluiceOperatorDefect", "its first count", operator={BUG: "_x30 1+0x200"}, silent=[29, 100], fires=32,
     labels=OP | {"controller": "mirror"})
case("SluiceOperatorDefect", "one more count", operator={BUG: then(1, 120, 2)}, silent=[100, 190], fires=122,
     labels=OP | {"controller": "mirror"})
HEARD = 'watch_last_event_timestamp_seconds{kind="Mirror"}'
case("SluiceOperatorWatchSilent", "nothing is heard from minute 10 on", operator={HEARD: "0+60x9 600+0x200"}, silent=[17, 18], fires=19,
     labels=OP | {"pod": "op-1", "kind": "Mirror"})
case("SluiceOperatorWatchSilent", "heard when the watch is begun anew", operator={HEARD: "0 _x4 300 _x4 600 _x4 900"}, silent=[4, 9, 14])
case("SluiceOperatorWatchErrors", "one error a minute", operator={'watch_errors_total{kind="Mirror"}': "0+1x240"}, silent=[12], fires=30,
     labels=OP | {"kind": "Mirror"})
case("SluiceOperatorWatchErrors", "one error in two minutes",
     operator={'watch_errors_total{kind="Mirror"}': " ".join(str(n // 2) for n in range(END))}, silent=[30, 60])
case("SluiceOperatorUndecodable", "its first count", operator={'undecodable_objects_total{kind="Mirror"}': "_x30 2+0x200"},
     silent=[29, 100], fires=32, labels=OP | {"kind": "Mirror"})
case("SluiceOperatorMissingPermissions", "a rule is missing", operator={"missing_permissions": flat(1)}, silent=[3], fires=10)
case("SluiceOrphanedSlots", "a slot stays", operator={"orphaned_slots": then(0, 10, 1)}, silent=[9, 19], fires=21)
case("SluiceOrphanedSlots", "a Source has a slot of no Mirror", operator={"slots_without_mirror": then(0, 10, 1)}, silent=[9, 19], fires=21)
case("SluiceDatabaseNotReady", "a Target is not ready", operator={'resources{kind="Target",ready="false"}': flat(1)}, silent=[25], fires=35,
     labels=OP | {"kind": "Target"})
case("SluiceMirrorsNotReady", "one is copied, one is not", operator={'resources{kind="Mirror",ready="false"}': flat(2),
                                                                   'workers{phase="Copying"}': flat(1)}, silent=[25], fires=35)
case("SluiceMirrorsNotReady", "none has a worker", operator={'resources{kind="Mirror",ready="false"}': flat(1)}, silent=[25], fires=35)
case("SluiceMirrorsNotReady", "all are copied", operator={'resources{kind="Mirror",ready="false"}': flat(1),
                                                          'workers{phase="Copying"}': flat(1)}, silent=[35, 120])
case("SluiceWorkersUnreachable", "a worker does not answer", operator={'workers{phase="Unreachable"}': flat(1)}, silent=[5], fires=15)


def series(prefix, name, values, labels):
    base, own = re.fullmatch(r"(\w+)(?:\{(.*)\})?", name).groups()
    text = dict(re.findall(r'(\w+)="([^"]*)"', own or ""))
    shown = ",".join(f'{key}="{value}"' for key, value in (labels | text).items())
    return {"series": f"{base if base == 'up' else prefix + base}{{{shown}}}", "values": values}


def inputs(worker, operator):
    def all_of(prefix, base, changes, labels):
        return [series(prefix, name, values, labels) for name, values in (base | (changes or {})).items() if values is not None]

    def mirror(name):
        return {"job": "sluice-worker", "namespace": "shop", "mirror": name, "pod": f"{name}-1"}

    found = all_of("sluice_worker_", WORKER, {}, mirror("calm"))
    if worker is not None:
        found += all_of("sluice_worker_", WORKER, worker, mirror("odd"))
    return found + all_of("sluice_operator_", OPERATOR, operator, {"job": "sluice-operator", "namespace": "sluice-system", "pod": "op-1"})


def looks(alert, fires, silent, labels, also):
    def at(minute, firing):
        samples = [{"labels": "{" + ", ".join(f'{key}="{value}"' for key, value in ({"alertname": name} | labels).items()) + "}", "value": 1}
                   for name in firing]
        expression = 'max by (alertname, namespace, mirror, pod, kind, controller) (ALERTS{alertstate="firing"})'
        return {"expr": expression, "eval_time": f"{minute}m", "exp_samples": samples}

    return [at(minute, []) for minute in silent] + ([at(fires, [alert, *also])] if fires is not None else [])


def document(rules_file, alerts):
    """The promtool file. `alerts`: names of all alerts; each must have a case that fires and one that is silent."""
    for what, tested in (("fires", {c[0] for c in CASES if c[4] is not None}), ("silent", {c[0] for c in CASES if c[5]})):
        assert tested == alerts, f"alerts without a case ({what}), or cases without an alert: {sorted(tested ^ alerts)}"
    used = {re.match(r"\w+", name)[0] for _, _, worker, operator, *_ in CASES for name in {**(worker or {}), **(operator or {})}}
    known = {re.match(r"\w+", name)[0] for name in WORKER | OPERATOR} | {"undecodable_objects_total"}
    assert used <= known, f"series of no name: {sorted(used - known)}"
    tests = [{"name": f"{alert}: {what}", "interval": "1m", "input_series": inputs(worker, operator),
              "promql_expr_test": looks(alert, fires, silent, labels, also)}
             for alert, what, worker, operator, fires, silent, labels, also in CASES]
    calm = {"name": "nothing fires where all is well", "interval": "1m", "input_series": inputs(None, None),
            "promql_expr_test": looks(None, None, [1, 20, 100, END - 1], {}, ())}
    return yaml.safe_dump({"rule_files": [rules_file], "evaluation_interval": "1m", "tests": [calm, *tests]}, sort_keys=False, width=1000)


def exported():
    """Names of all series that the cases use."""
    for prefix, names in (("sluice_worker_", WORKER), ("sluice_operator_", OPERATOR)):
        yield from (prefix + re.match(r"\w+", name)[0] for name in names if name != "up")

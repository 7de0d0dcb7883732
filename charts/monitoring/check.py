"""Checks of the alert rules, their runbooks and the dashboard. Arguments: file rendered from the chart, folder to work in, promtool.

The thresholds are the defaults, but for suspendedFor=2h: so that a change of values is seen to arrive, and tests stay short."""
import json
import pathlib
import re
import subprocess
import sys

import yaml

import alerts_test
import dashboard
import source

rendered, work, promtool = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
BOOK = source.ROOT / "docs/src"
checks = 0


def check(ok, what):
    global checks
    checks += 1
    if not ok:
        sys.exit(f"monitoring: {what}")


def run(*arguments):
    done = subprocess.run([promtool, *arguments], cwd=work, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"promtool {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def anchors(page):
    """Of the headings, as mdBook makes them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", page, re.M)}


objects = [d for d in yaml.safe_load_all(rendered.read_text()) if d]
exported = source.operator() | source.worker()

# The labels that rules rely on.
relabelings = [endpoint["relabelings"] for d in objects if d["kind"] == "PodMonitor" for endpoint in d["spec"]["podMetricsEndpoints"]]
jobs = {rule["replacement"] for rules in relabelings for rule in rules if rule["targetLabel"] == "job"}
check(jobs == {"sluice-operator", "sluice-worker"}, f"jobs of the PodMonitors: {sorted(jobs)}")
check({"sourceLabels": ["__meta_kubernetes_pod_label_sluice_dev_mirror"], "targetLabel": "mirror"} in sum(relabelings, []), "label mirror")

# ---------------------------------------------------------------- alert rules
rules = [d for d in objects if d["kind"] == "PrometheusRule"]
check(len(rules) == 1, f"{len(rules)} PrometheusRules, expected 1")
groups = rules[0]["spec"]["groups"]
alerts = {rule["alert"]: rule for group in groups for rule in group["rules"]}
check(len(alerts) == sum(len(group["rules"]) for group in groups), "two alerts of one name")

for name, rule in alerts.items():
    for fault in source.faults(rule["expr"]):
        check(False, f"{name}: {fault}")
    check(rule["labels"]["severity"] in ("critical", "warning", "info"), f"{name}: severity")
    notes = rule["annotations"]
    check(set(notes) == {"summary", "description", "runbook_url"}, f"{name}: annotations")
    check("{{" not in notes["summary"], f"{name}: a summary is the same for all objects")
    check(notes["runbook_url"] == f"https://github.com/sluice-dev/sluice/blob/main/docs/src/runbooks/{name}.md", f"{name}: runbook_url")
    # What the outermost aggregation keeps is what the description can and must name; absent() keeps nothing.
    kept = re.match(r"[a-z]+\((?=up)|.*?by \(([^)]*)\)", rule["expr"], re.S)[1] or ""
    named = set(re.findall(r"\$labels\.(\w+)", notes["description"]))
    check(named == set(re.findall(r"\w+", kept)) - {"le"}, f"{name}: the description names {sorted(named)}, the alert has {kept}")

(work / "rules.yaml").write_text(yaml.safe_dump(rules[0]["spec"], width=1000))
run("check", "rules", "rules.yaml")
unknown = set(alerts_test.exported()) - set(exported)
check(not unknown, f"the tests use series that nobody exports: {sorted(unknown)}")
(work / "tests.yaml").write_text(alerts_test.document("rules.yaml", set(alerts)))
run("test", "rules", "tests.yaml")

# ---------------------------------------------------------------- dashboard
found = [d for d in objects if d["kind"] == "ConfigMap" and d["metadata"]["labels"].get("grafana_dashboard") == "1"]
check(len(found) == 1, f"{len(found)} ConfigMaps with a dashboard, expected 1")
board = json.loads(found[0]["data"]["sluice.json"])
check(board == dashboard.dashboard(), "the dashboard is stale: run charts/monitoring/dashboard.py >charts/sluice/monitoring/dashboard.json && config/render.sh")
variables = {variable["name"] for variable in board["templating"]["list"]}
panels = [panel for panel in board["panels"] if panel["type"] != "row"]
check(len({panel["title"] for panel in panels}) == len(panels), "two panels of one title")
expressions = {f"{panel['title']} {each['refId']}": each["expr"] for panel in panels for each in panel["targets"]}
queries = {variable["name"]: variable["definition"] for variable in board["templating"]["list"] if variable["type"] == "query"}
for title, expression in (expressions | queries).items():
    for fault in source.faults(expression):
        check(False, f"panel {title}: {fault}")
    for variable in re.findall(r"\$(\w+)", expression):
        check(variable in variables | {"__rate_interval"}, f"panel {title}: no variable {variable}")
for panel in panels:
    for each in panel["targets"]:
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", each["expr"]))))
        shown = set(re.findall(r"\{\{(\w+)\}\}", each["legendFormat"]))
        check(shown <= kept, f"panel {panel['title']}: the legend shows {sorted(shown - kept)}, which the query drops")
# With every series there is, each panel shows something.
values = {"$__rate_interval": "5m", "$namespace": ".*", "$mirror": ".*"}
shows = [f"count({re.sub(r'[$][a-z_]+', lambda found: values[found[0]], each)}) > bool 0" for each in expressions.values()]
(work / "panels.yaml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [{
    "interval": "1m",
    "input_series": [{"series": name, "values": "0+60x30" if counts else "1+0x30"} for name, counts in source.one_of_each()],
    "promql_expr_test": [{"expr": each, "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 1}]} for each in shows],
}]}, width=1000))
run("test", "rules", "panels.yaml")

# ---------------------------------------------------------------- the book
pages = {page.stem: page.read_text() for page in (BOOK / "runbooks").glob("*.md") if page.stem != "index"}
check(set(pages) == set(alerts), f"alerts without a runbook, or runbooks without an alert: {sorted(set(pages) ^ set(alerts))}")
listed = (BOOK / "SUMMARY.md").read_text()
index = (BOOK / "runbooks/index.md").read_text()
rust = [path.read_text() for path in (source.ROOT / "src").rglob("*.rs")]
for name, page in pages.items():
    check(f"(runbooks/{name}.md)" in listed, f"docs/src/SUMMARY.md does not list runbooks/{name}.md")
    check(f"[{name}]({name}.md)" in index, f"docs/src/runbooks/index.md does not list {name}")
    check(page.startswith(f"# {name}\n"), f"{name}.md: title")
    heads = re.findall(r"^## (.*)$", page, re.M)
    check(heads == ["Meaning", "Impact", "Diagnosis", "Cure"], f"{name}.md: sections {heads}")
    check(alerts[name]["labels"]["severity"] in page.split("## Meaning")[0], f"{name}.md: severity")
    for fault in source.faults(page):
        check(False, f"{name}.md: {fault}")
    for words in re.findall(r"grep '([^']+)'", page):
        check(any(words in text for text in rust), f"{name}.md: nobody logs '{words}'")
    for link, heading in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", page):
        path = BOOK / "runbooks" / link
        check(path.exists(), f"{name}.md: no page {link}")
        check(not heading or heading in anchors(path.read_text()), f"{name}.md: {link} has no heading {heading}")

# Each metric is explained once.
metrics = (BOOK / "operations/metrics.md").read_text()
for name in exported:
    short = re.sub(r"^sluice_(operator|worker)_|_(bucket|sum|count)$", "", name)
    check(re.search(rf"`{short}[`{{]", metrics), f"docs/src/operations/metrics.md does not explain {name}")
print(f"monitoring: {len(alerts)} alerts, {len(alerts_test.CASES)} cases, {len(panels)} panels, {checks} checks passed")

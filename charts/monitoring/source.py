"""What operator and workers export, read from the Rust source: so that a renamed metric or label fails the checks."""
import itertools
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What scraping adds, see the chart's PodMonitors.
TARGET_LABELS = {"job", "namespace", "pod", "instance", "container", "endpoint"}


def suffixed(prefix, name, kind, labels):
    """The series of one metric, in the names of the text format."""
    name = f"{prefix}_{name}"
    if kind == "histogram":
        return {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
    return {name + {"counter": "_total", "info": "_info", "gauge": ""}[kind]: labels}


def body(text):
    return text.split("#[cfg(test)]")[0]


def info(prefix, text):
    found = re.findall(r'register\("(\w+)",\s*"[^"]*",\s*Info::new\(\[\("(\w+)"', text)
    assert len(found) == 1, f"{prefix}: the metric of the build was not found"
    return suffixed(prefix, found[0][0], "info", {found[0][1]})


def operator():
    text = body((ROOT / "src/operator/metrics.rs").read_text())
    structs = {name: set(re.findall(r"(\w+):", fields)) for name, fields in re.findall(r"struct (\w+) \{(.*?)\n\}", text, re.S)}
    fields = dict(re.findall(r"^    (\w+): ((?:Family|Gauge|Counter|Histogram)[^\n]*),$", text, re.M))
    registered = re.findall(r'all\.register\(\s*"(\w+)",\s*"[^"]*",\s*self\.(\w+)\.clone\(\),?\s*\)', text)
    assert len(registered) + 1 == text.count("all.register("), "src/operator/metrics.rs: a registration was not understood"
    series = info("sluice_operator", text)
    for name, field in registered:
        family = re.fullmatch(r"Family<(\w+), (\w+)[<>\w, ]*>", fields[field])
        labels, kind = (structs[family[1]], family[2]) if family else (set(), re.match(r"\w+", fields[field])[0])
        series |= suffixed("sluice_operator", name, kind.lower(), labels)
    return {name: labels | TARGET_LABELS for name, labels in series.items()}


def worker():
    text = body((ROOT / "src/worker/metrics.rs").read_text())
    calls = re.findall(r'out\.(\w+)\(\s*"(\w+)",\s*"[^"]*"(?:,\s*"(\w+)")?', text)
    assert len(calls) == len(re.findall(r"\bout\.\w+\(", text)), "src/worker/metrics.rs: a metric was not understood"
    series = info("sluice_worker", text)
    for kind, name, label in calls:
        series |= suffixed("sluice_worker", name, kind.removesuffix("s"), {label} if label else set())
    return {name: labels | TARGET_LABELS | {"mirror"} for name, labels in series.items()}


def words(path, what, pattern):
    found = set(re.findall(pattern, re.search(what, (ROOT / path).read_text(), re.S)[0]))
    assert found, f"{path}: {what} was not found"
    return found


def label_values():
    """Values of labels that are words of the source, by component and label."""
    phases = words("src/worker/metrics.rs", r"fn word\(.*?\n}", r'=> "(\w+)"')
    return {
        "worker": {
            "phase": phases,
            "state": words("src/engine/table.rs", r"impl TableState \{.*?\n}", r'=> "(\w+)"'),
            "class": words("src/engine/error.rs", r"impl Class \{.*?\n}", r'=> "(\w+)"'),
            "op": words("src/worker/metrics.rs", r"fn encode_session.*?\n}", r'\("(\w+)", view'),
        },
        "operator": {
            "phase": phases | {"Unreachable"},
            "class": words("src/operator/error.rs", r"impl ErrorClass \{.*?\n}", r'=> "(\w+)"') | {""},
            "outcome": words("src/operator/reconcile.rs", r"async fn bounded.*?\n}", r'"(success|failure|panic|timeout)"'),
            "ready": {"true", "false"},
        },
    }


def one_of_each():
    """All series, two pods of each kind: (name with labels, whether it counts)."""
    values = label_values()
    for name, labels in (operator() | worker()).items():
        component = name.split("_")[1]
        known = values[component] | {"kind": {"Source", "Target", "Mirror"}, "le": {"1", "+Inf"}, "mirror": {"shop"}, "namespace": {"shop"}, "pod": {"a", "b"}}
        own = sorted(labels - TARGET_LABELS | {"namespace", "pod"})
        for chosen in itertools.product(*(sorted(known.get(label, {"x"})) for label in own)):
            shown = ",".join(f'{label}="{value}"' for label, value in zip(own, chosen))
            yield f"{name}{{{shown}}}", name.endswith(("_total", "_bucket", "_sum", "_count"))


def faults(expression):
    """What a PromQL expression names that nobody exports."""
    exported, values = operator() | worker(), label_values()
    for name, matchers in re.findall(r"\b(sluice_\w+)(?:\{([^}]*)\})?", expression):
        if name not in exported:
            yield f"no metric {name}"
            continue
        component = name.split("_")[1]
        for label, value in re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"([^"]*)"', matchers):
            if label not in exported[name]:
                yield f"{name} has no label {label}"
            elif "$" not in value and label in values[component]:
                yield from (f"{name}: {label} is never {word}" for word in value.split("|") if word not in values[component][label])

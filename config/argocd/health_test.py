"""Runs health.lua over the objects of health_test.yaml in Lua 5.1, with no more of its library than Argo CD gives."""
import pathlib
import subprocess
import sys

import yaml

HERE = pathlib.Path(__file__).parent
# Argo CD opens the basic library, tables and a part of os; no strings, no numbers, no files.
HARNESS = """
local environment = {
  assert = assert, error = error, getmetatable = getmetatable, ipairs = ipairs, next = next, pairs = pairs, pcall = pcall,
  rawequal = rawequal, rawget = rawget, rawset = rawset, select = select, setmetatable = setmetatable, tonumber = tonumber,
  tostring = tostring, type = type, unpack = unpack, table = table,
  os = {clock = os.clock, date = os.date, difftime = os.difftime, time = os.time},
}
environment._G = environment
getmetatable("").__index = nil
for _, object in ipairs(objects) do
  environment.obj = object
  local script = assert(loadfile("health.lua"))
  setfenv(script, environment)
  local health = script()
  io.write(health.status, "\\t", health.message, "\\n")
end
"""


def lua(value):
    """A literal of Lua; a null is an absence."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{lua(key)}] = {lua(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(lua(item) for item in value) + "}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(f"\\{byte:03d}" for byte in value.encode()) + '"'
    return str(value)


def condition(kind, text):
    words = text.split()
    status, reason = words if len(words) == 2 else ("True", words[0])
    return {"type": kind, "status": status, "reason": reason, "message": f"about {kind}", "observedGeneration": 3,
            "lastTransitionTime": "2026-01-01T00:00:00Z"}


def made(case):
    spec = {"suspend": True} if case.get("suspend") else {}
    item = {"apiVersion": "sluice.dev/v1alpha1", "kind": case["kind"], "spec": spec,
            "metadata": {"name": "shop", "namespace": "shop", "generation": 3, "annotations": case.get("annotations")}}
    if "seen" in case:
        item["status"] = {"observedGeneration": case["seen"]}
        if "is" in case:
            item["status"]["conditions"] = [condition(kind, text) for kind, text in case["is"].items()]
    return item


cases = yaml.safe_load((HERE / "health_test.yaml").read_text())
program = f"local objects = {lua([made(case) for case in cases])}\n{HARNESS}"
done = subprocess.run(["lua5.1", "-"], input=program, cwd=HERE, capture_output=True, text=True, check=False)
if done.returncode:
    sys.exit(f"argocd: {done.stderr}")
verdicts = [line.split("\t") for line in done.stdout.splitlines()]
if len(verdicts) != len(cases):
    sys.exit(f"argocd: {len(verdicts)} verdicts on {len(cases)} objects\n{done.stdout}")
for case, verdict in zip(cases, verdicts):
    expected = [case["expect"], case["message"]]
    if verdict != expected:
        sys.exit(f"argocd: {case['kind']}, {case['what']}: {verdict}, expected {expected}")
missing = {"Progressing", "Healthy", "Degraded", "Suspended"} - {case["expect"] for case in cases}
if missing:
    sys.exit(f"argocd: no case for {sorted(missing)}")
print(f"argocd: {len(cases)} verdicts are right")

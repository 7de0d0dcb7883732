-- Health of Source, Target and Mirror for Argo CD. One script for all three kinds:
-- they share the conditions Ready, Reconciling and Stalled.
local hs = { status = "Progressing", message = "Waiting for the operator" }

local annotations = obj.metadata.annotations
if annotations ~= nil and annotations["sluice.dev/pause-reconciliation"] == "true" then
  hs.status = "Suspended"
  hs.message = "Reconciliation is paused by annotation"
  return hs
end

-- A status of an older generation says nothing about the spec that was just applied.
if obj.status == nil or obj.status.observedGeneration ~= obj.metadata.generation then
  return hs
end

local conditions = {}
for _, condition in ipairs(obj.status.conditions or {}) do
  conditions[condition.type] = condition
end
local function is(kind, status)
  return conditions[kind] ~= nil and conditions[kind].status == status
end
local function report(status, condition)
  local parts = {}
  if condition.reason ~= nil and condition.reason ~= "" then
    parts[#parts + 1] = condition.reason
  end
  if condition.message ~= nil and condition.message ~= "" then
    parts[#parts + 1] = condition.message
  end
  hs.status = status
  hs.message = table.concat(parts, ": ")
  return hs
end

-- A bad new spec, or something only a person can put right; an earlier good spec may still be running.
if is("Stalled", "True") then
  return report("Degraded", conditions.Stalled)
end
-- Before Ready: a suspended Mirror is Ready.
if is("Suspended", "True") then
  return report("Suspended", conditions.Suspended)
end
if is("Reconciling", "True") then
  return report("Progressing", conditions.Reconciling)
end
if is("Ready", "True") then
  return report("Healthy", conditions.Ready)
end
if is("Ready", "False") then
  return report("Degraded", conditions.Ready)
end
return hs

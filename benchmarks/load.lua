-- wrk -s load.lua URL -- HEAD TAIL BYTES: requests are HEAD, a new seed, TAIL; answers are 200 with a body of BYTES.
local threads = {}

function setup(thread)
  thread:set("first", 1000000000 + #threads * 100000000) -- ten digits, so that every request is equally long
  table.insert(threads, thread)
end

function init(args)
  head, tail, bytes, seed, wrong = args[1], args[2], tonumber(args[3]), first, 0
end

function request()
  seed = seed + 1
  return head .. seed .. tail
end

function response(status, headers, body)
  if status ~= 200 or #body ~= bytes then wrong = wrong + 1 end
end

function done(summary, latency, requests)
  local total, errors = 0, summary.errors
  for _, thread in ipairs(threads) do total = total + thread:get("wrong") end
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "wrong": %d, "broken": %d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
    total, errors.connect + errors.read + errors.write + errors.timeout))
end

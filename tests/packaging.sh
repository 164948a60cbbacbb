#!/usr/bin/env bash
# Builds the wheel and uses it in empty environments, in folders outside the checkout: `make check-wheel`.
# Takes minutes and needs a package registry.
#   BUILDER  a Python with hatchling
#   PYTHON   the Python of the empty environments
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
builder=$(realpath -s "${BUILDER:-$root/.venv/bin/python}") python=${PYTHON:-python3}
scratch=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; rm -rf "$scratch"' EXIT
cd "$root" && "$builder" -m hatchling build -t wheel -d "$scratch/wheel" >/dev/null
wheel=$(echo "$scratch"/wheel/*.whl)
cd "$scratch"
unset PYTHONPATH

environment() { # NAME [EXTRAS] [PACKAGE ...]: an environment with the wheel
  local name=$1 extras=${2:-}
  shift $(($# < 2 ? $# : 2))
  "$python" -m venv "$name"
  "$name/bin/pip" install -q --disable-pip-version-check "$wheel$extras" "$@"
}

serve() { # NAME FOLDER: `reparam serve` of that environment in that folder, ready on $url
  local port
  port=$("$python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  url=http://127.0.0.1:$port
  (cd "$2" && exec "$scratch/$1/bin/reparam" serve --port "$port" 2>"$scratch/$1.log") &
  server=$!
  for _ in $(seq 120); do
    curl -sf "$url/readyz" >/dev/null && return
    sleep 0.5
  done
  cat "$scratch/$1.log" && exit 1
}

stop() {
  kill "$server" && wait "$server"
  server=
}

png() { # MODEL FILE
  curl -sSf "$url/sample" -H 'Content-Type: application/json' -H 'Accept: image/png' \
    -d "{\"model\": \"$1\", \"n\": 64, \"seed\": 7}" -o "$2"
}

echo '== the SDK alone'
environment sdk
sdk/bin/python - <<'PYTHON'
import subprocess, sys
from importlib.metadata import distributions

found = {"torch", "onnxruntime", "fastapi", "pydantic"} & {item.name for item in distributions()}
assert not found, f"installed: {found}"
program = "import time; start = time.process_time(); import reparam; print(time.process_time() - start)"
seconds = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(5)]
print(f"import reparam takes {min(seconds):.2f} s of CPU time")
assert min(seconds) < 0.3
PYTHON
sdk/bin/reparam --help >help.txt
for command in serve publish inspect; do
  if sdk/bin/reparam $command 2>error.txt; then exit 1; fi
  cat error.txt
  grep -q "pip install 'reparam\[" error.txt
done

echo '== [serve]: the demo models'
environment serving '[serve]'
mkdir empty
serve serving empty
png gumbel-mnist grid.png
cmp grid.png "$root/docs/images/gumbel-mnist.png"
sdk/bin/python - "$url" <<'PYTHON'
import sys

import reparam

with reparam.Client(sys.argv[1]) as client:
    samples = client.sample(n=16, seed=7, model="gaussian-mnist")
print(samples.images.shape, samples.model)
PYTHON
sdk/bin/reparam models --url "$url"
stop
serving/bin/reparam verify serving/lib/python3*/site-packages/reparam/artifacts/gumbel-mnist/3

echo '== [serve,export]: a VAE of its own, in a folder with a models.py of its own'
environment export '[serve,export]' "$(grep ^torch== "$root/requirements/pins.txt")"
mkdir mine
cat >mine/models.py <<'PYTHON'
from torch import nn


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2 * 4))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())
PYTHON
cat >mine/publish.py <<'PYTHON'
import torch
from models import VAE
from reparam.export import Network, publish

torch.manual_seed(0)
vae = VAE()
network = Network(
    "gaussian", latent_shape=(4,), image_shape=(1, 8, 8), encoder=vae.encoder, decoder=vae.decoder
)
print(publish(network, "mine", "artifacts"))
PYTHON
(cd mine && ../export/bin/python publish.py)
serve export mine
png mine mine.png
sdk/bin/reparam sample -n 3 --model mine --url "$url" -o mine.npy
stop
grep -o '"reason":"artifacts in the working directory"' export.log
export/bin/reparam train gaussian --data digits --epochs 1 --width 8 --out runs/digits >train.log
export/bin/reparam evaluate runs/digits --samples 2 --images 100 >evaluation.log
export/bin/reparam publish runs/digits --name digits
export/bin/reparam inspect artifacts/digits/1 >contract.txt
grep "^latent shape" contract.txt
echo 'the wheel works'

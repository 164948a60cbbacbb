# The serving image: no torch, no compiler, not root.
#   docker build -t reparam .                              for the CPU
#   docker build -t reparam:cuda --build-arg DEVICE=cuda . with CUDA 13 and cuDNN 9 from PyPI
FROM python:3.11-slim-bookworm AS build
ARG DEVICE=cpu
COPY requirements /requirements
RUN python -m venv /venv \
    && case "$DEVICE" in \
        cpu)  set -- -r /requirements/service.txt ;; \
        cuda) set -- -r /requirements/service.txt -r /requirements/cuda.txt ;; \
        *)    echo "DEVICE is '$DEVICE'; it must be cpu or cuda" >&2; exit 1 ;; \
    esac \
    && /venv/bin/pip install --no-cache-dir --no-compile --require-hashes "$@" \
    # Only a GPU can use these libraries, three quarters of the runtime.
    && if [ "$DEVICE" = cpu ]; then rm -f /venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_[ct]*; fi
RUN python -m venv /build && /build/bin/pip install --no-cache-dir --require-hashes -r /requirements/build.txt
WORKDIR /source
COPY . .
# The same wheel as `pip install reparam`, with the demo models.
RUN /build/bin/python -m hatchling build -t wheel -d /wheel \
    && /venv/bin/pip install --no-cache-dir --no-compile --no-deps /wheel/*.whl \
    && /venv/bin/pip uninstall -q -y pip setuptools

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin reparam
# Models in /app/artifacts, a mounted folder for example, take the place of the demo models.
WORKDIR /app
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 REPARAM_HOST=0.0.0.0 REPARAM_PORT=8000
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"REPARAM_PORT\"]}/readyz', timeout=2)"]
CMD ["reparam", "serve"]

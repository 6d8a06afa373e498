# mm with everything it needs, for heads and workers. From the repository's root:
#   docker build -f cluster/images/mm.Dockerfile --build-arg DEVICE=cpu  -t registry.example.com/mm:0.1.0-cpu .
#   docker build -f cluster/images/mm.Dockerfile --build-arg DEVICE=cuda -t registry.example.com/mm:0.1.0-cuda .
ARG DEVICE=cpu

# The Python that constraints.txt was made with.
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# KubeRay's probes call wget; Ray looks at processes with ps.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray
WORKDIR /opt/mm
COPY constraints.txt .
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# 2.13.0+cpu, which pip prefers to 2.13.0.
FROM base AS torch-cpu
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch

# torch brings CUDA along; the driver is the machine's. torch.compile compiles small programs in C.
FROM base AS torch-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir --constraint constraints.txt torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM torch-${DEVICE} AS mm
WORKDIR /opt/mm
COPY pyproject.toml README.md LICENSE mm.py ./
COPY mm_core mm_core
COPY pipelines pipelines
COPY serve serve
COPY cluster cluster
# The code stays in /opt/mm, where heads and workers import it from.
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && pip install --no-cache-dir --constraint constraints.txt --no-build-isolation --editable .
ARG REVISION=unknown
# Below this level Ray logs the variables that jobs were given, if only where it cannot make their environment.
ENV MM_CODE_REVISION=${REVISION} RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_LOGGER_LEVEL=critical
USER 1000
WORKDIR /home/ray
CMD ["mm", "--help"]

# syntax=docker/dockerfile:1
#
# Images of the bestroute server. CPU: 0.4 GB of Python packages; GPU (CUDA 13): 3 GB.
#
#   docker build --target cpu --tag bestroute:cpu .
#   docker run --read-only --publish 50051:50051 bestroute:cpu
#
#   docker build --target gpu --tag bestroute:gpu .
#   docker run --read-only --publish 50051:50051 --gpus all bestroute:gpu
#
# Settings come from BESTROUTE_* variables or `serve --config FILE`. Nothing is written at run time,
# but the GPU image's compiled TensorRT engines to /var/cache/bestroute. `docker stop` kills after 10 s: give it
# `--time 35`, which is as long as the server lets calls under way finish.
#
# Both images have the same base. The GPU image takes CUDA and cuDNN from the packages that
# onnxruntime-gpu names as its own, so that their versions always fit, and not from an nvidia/cuda
# base, whose versions somebody would have to keep in step by hand.

ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

# What each image installs besides our wheel. While these files stay the same, so do the large
# layers made from them, however often the sources change.
FROM python:${PYTHON} AS requirements
# "gpu,tensorrt" adds TensorRT, which comes from NVIDIA's own package index.
ARG GPU_EXTRAS=gpu
# In both images: JSON Web Tokens and traces. "jwt,otel,log" adds the decision log, 0.1 GB.
ARG EXTRAS=jwt,otel
WORKDIR /requirements
COPY pyproject.toml .
RUN for extras in "cpu,${EXTRAS}" "${GPU_EXTRAS},${EXTRAS}"; do \
      python -c 'import sys, tomllib; \
                 project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
                 optional = project["optional-dependencies"]; \
                 extras = sys.argv[1].split(","); \
                 print(*project["dependencies"], *sum(map(optional.get, extras), []), sep="\n")' \
        "${extras}" > "${extras%%,*}.txt"; \
    done

FROM python:${PYTHON} AS base
# The official image comes without the standard library's bytecode. It could not be written when
# the server runs, and compiling it at every start and health check takes half a second each.
RUN python -m compileall -q -j 0 "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && groupadd --gid 65532 bestroute \
 && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin bestroute \
 && install --directory --owner=65532 --group=65532 /var/cache/bestroute \
 && python -m venv --without-pip /opt/bestroute
ENV PATH=/opt/bestroute/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BESTROUTE_SERVER__LISTEN=0.0.0.0:50051 \
    BESTROUTE_METRICS__LISTEN=0.0.0.0:9464
LABEL org.opencontainers.image.title="bestroute" \
      org.opencontainers.image.description="Routes each prompt to the cheapest LLM and number of samples that matches your reference LLM" \
      org.opencontainers.image.licenses="Apache-2.0"
STOPSIGNAL SIGTERM
# gRPC, metrics; and OpenAI's API, where `[gateway] listen` asks for it.
EXPOSE 50051 9464 8080

FROM base AS cpu
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/bestroute install -r /requirements/cpu.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip --python /opt/bestroute install --no-cache-dir --no-deps /wheels/*.whl
USER 65532:65532
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["bestroute", "health"]
ENTRYPOINT ["bestroute"]
CMD ["serve"]

FROM base AS gpu
RUN --mount=type=bind,from=requirements,source=/requirements,target=/requirements \
    --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/bestroute install -r /requirements/gpu.txt
# ONNX Runtime leaves finding the libraries of those packages to the system's loader.
RUN find /opt/bestroute -type d \( -path '*/nvidia/*/lib' -o -name tensorrt_libs \) \
      > /etc/ld.so.conf.d/bestroute.conf \
 && ldconfig
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip --python /opt/bestroute install --no-cache-dir --no-deps /wheels/*.whl
ENV BESTROUTE_ENGINE__PROVIDER=cuda \
    BESTROUTE_ENGINE__CACHE=/var/cache/bestroute \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /var/cache/bestroute
USER 65532:65532
# TensorRT compiles for minutes before the server listens, unless the cache has what it made before.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m \
    CMD ["bestroute", "health"]
ENTRYPOINT ["bestroute"]
CMD ["serve"]

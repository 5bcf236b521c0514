# syntax=docker/dockerfile:1
# The packages that the pipeline needs, at the versions of constraints.txt, and a copy of the pipeline in /app. A checkout
# mounted there keeps its results:
#   docker build -t mdeq .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/app" mdeq
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/app" --gpus all --shm-size 2g mdeq
# Without CUDA, several GB smaller:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t mdeq .
FROM python:3.11-slim-bookworm AS packages
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --copies /venv
COPY pyproject.toml constraints.txt /tmp/

# torch weighs most and changes least
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    /venv/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c /tmp/constraints.txt torch torchvision

# OpenCV without its windows, which would need a display's libraries; its version is that of opencv-python
WORKDIR /tmp
RUN --mount=type=cache,target=/root/.cache/pip \
    sed 's/^opencv-python==/opencv-python-headless==/' constraints.txt > image-constraints.txt \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['pipeline'], sep='\n')" \
        | sed 's/^opencv-python>/opencv-python-headless>/' > requirements.txt \
    && /venv/bin/pip install -c image-constraints.txt -r requirements.txt

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="mdeq" \
      org.opencontainers.image.description="Multiscale Deep Equilibrium Models: the paper as a pipeline" \
      org.opencontainers.image.licenses="MIT"

# git and sqlite for DVC and MLflow; dumb-init passes a stop on to the whole pipeline
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends dumb-init git libsqlite3-0 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -m 777 /app /store
COPY --from=packages /venv /venv
WORKDIR /app
COPY . .
RUN chmod -R a+rwX /app

# Any user will do: whoever it is has a home and a name
USER 1000
ENV PATH=/venv/bin:$PATH HOME=/tmp USER=mdeq DVC_SITE_CACHE_DIR=/tmp/dvc \
    PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# As Ctrl-C: the stage saves its state, DVC frees its locks, and the same command resumes
STOPSIGNAL SIGINT
ENTRYPOINT ["dumb-init", "--"]
CMD ["sh", "-c", "[ -e .git ] || dvc config --local core.no_scm true; python -m pipeline check && dvc repro && python -m pipeline sync && python -m pipeline show"]
